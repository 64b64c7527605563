"use strict";
(() => {
  const { series, charts } = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  // As in page.html's swatches: what tells series apart without color.
  const markers = ["circle", "rect", "triangle", "rectRot", "cross", "crossRot"];
  const dashes = [[], [7, 3], [2, 2], [9, 3, 2, 3]];
  const drawn = [];

  const style = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const color = (hue, alpha) => `hsla(${hue}, ${style("saturation")}, ${style("lightness")}, ${alpha})`;

  const target = {
    id: "target",
    afterDatasetsDraw({ ctx, chartArea, scales }, _, { values, ink }) {
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = ink;
      ctx.font = `600 12px ${Chart.defaults.font.family}`;
      ctx.setLineDash([6, 4]);
      for (const value of values) {
        const y = scales.y.getPixelForValue(value);
        ctx.beginPath();
        ctx.moveTo(chartArea.left, y);
        ctx.lineTo(chartArea.right, y);
        ctx.stroke();
        ctx.fillText(`target ${value}`, chartArea.left + 6, y - 6); // where curves are high
      }
      ctx.restore();
    },
  };

  /** A line: by its series' color, and by dashes and marker; those of subsets, all names but the first, are thinner. */
  function dataset(line, names, marked) {
    const { label, hue } = series[line.series];
    const of = names.indexOf(line.name);
    const faint = line.faint;
    return {
      label: names.length < 2 ? label : line.name,
      group: `${line.series} ${line.name}`,
      data: line.points.map(([x, y]) => ({ x, y })),
      borderColor: color(hue, faint ? 0.25 : 1),
      backgroundColor: color(hue, 1),
      borderWidth: faint ? 1 : of ? 1.5 : 2.5,
      borderDash: faint ? [] : dashes[(line.series + of) % dashes.length],
      pointStyle: markers[(line.series + of) % markers.length],
      pointRadius: faint || !(marked || line.points.length === 1) ? 0 : 4,
      pointHitRadius: faint ? 0 : 8,
      faint,
      order: faint ? 1 : 0,
    };
  }

  function options(chart, legend) {
    const [ink, soft, grid, card] = ["ink", "soft", "grid", "card"].map(style);
    const axis = (text) => ({
      title: { display: true, text, color: soft },
      ticks: { color: soft, maxRotation: 0, autoSkipPadding: 16 },
      grid: { color: grid },
      border: { color: grid },
    });
    const x = { type: "linear", min: 0, bounds: "data", ...axis(chart.x) };
    if (chart.x === "epoch") x.suggestedMax = 2; // a single one stands in the middle
    x.ticks.precision = 0;
    x.afterBuildTicks = ({ ticks }) => {
      const [second, last] = ticks.slice(-2).map((tick) => tick.value);
      if (ticks.length > 2 && last - second < 0.8 * (ticks[1].value - ticks[0].value)) ticks.pop(); // they would overlap
    };
    const y = { type: chart.logarithmic ? "logarithmic" : "linear", ...axis(chart.y) };
    if (!chart.logarithmic) {
      Object.assign(y, { min: 0, suggestedMax: Math.max(0, ...chart.targets) * 1.1 });
      y.ticks.callback = (value) => String(Number(value.toPrecision(3)));
    }
    return {
      animation: false,
      maintainAspectRatio: false,
      devicePixelRatio: Math.max(2, window.devicePixelRatio), // sharp on paper too
      interaction: { mode: "nearest", axis: "x", intersect: false },
      scales: { x, y },
      plugins: {
        legend: {
          display: legend,
          position: "bottom",
          labels: { usePointStyle: true, boxHeight: 7, color: ink, filter: ({ datasetIndex }, { datasets }) => !datasets[datasetIndex].faint },
          // A series goes and comes with all of its lines.
          onClick: (_, { datasetIndex }, { chart: { data }, chart: of }) => {
            const shown = !of.isDatasetVisible(datasetIndex);
            data.datasets.forEach((each, index) => {
              if (each.group === data.datasets[datasetIndex].group) of.setDatasetVisibility(index, shown);
            });
            of.update();
          },
        },
        target: { values: chart.targets, ink },
        tooltip: {
          backgroundColor: ink,
          titleColor: card,
          bodyColor: card,
          usePointStyle: true,
          filter: (item) => !item.dataset.faint,
          callbacks: {
            title: ([item]) => (item ? `${chart.x} ${item.parsed.x.toLocaleString("en")}` : ""),
            label: (item) => ` ${item.dataset.label}: ${Number(item.parsed.y.toPrecision(4))}`,
          },
        },
      },
    };
  }

  function draw() {
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    for (const chart of drawn.splice(0)) chart.destroy();
    for (const chart of charts) {
      const names = [...new Set(chart.lines.map((line) => line.name))];
      const datasets = chart.lines.map((line) => dataset(line, names, chart.x !== "step"));
      const legend = names.length > 1 || series.length > 1;
      const canvas = document.getElementById(chart.id);
      drawn.push(new Chart(canvas, { type: "line", data: { datasets }, options: options(chart, legend), plugins: [target] }));
    }
  }

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // Paper is white, whatever the screen is.
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) {
    window.addEventListener(event, () => {
      root.classList.toggle("print", printing);
      draw();
    });
  }
})();
