"""One page that shows what happened in one run, or in several side by side.

Chart.js draws it, and lies here as its authors publish it (chart.umd.min.js of npm's chart.js). It was chosen over
libraries that come as Python packages because nothing has to be installed: every machine that has trained can write its
report. And it makes a page larger by only 0.2 MB.
"""
