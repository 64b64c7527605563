"use strict";
(() => {
  const { labels, charts } = JSON.parse(document.getElementById("figures").textContent);
  // As in page.html's swatches: what tells series apart without color.
  const hueOf = (series) => (215 + series * 137.508) % 360; // the golden angle: neighbors differ most
  const markers = ["circle", "rect", "triangle", "rectRot", "cross", "crossRot"];
  const dashes = [[], [7, 3], [2, 2], [9, 3, 2, 3]];
  const hidden = new Set(); // numbers of series
  const drawn = [];

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const color = (hue, alpha) => `hsla(${hue}, ${style("saturation")}, ${style("lightness")}, ${alpha})`;
  const last = (chart) => chart.lines.flatMap((line) => line.points.map(([x]) => x)).reduce((a, b) => Math.max(a, b), 0);
  const longest = Math.max(0, ...charts.filter((chart) => chart.x === "time (s)").map(last));
  const [unit, seconds] = longest < 600 ? ["s", 1] : longest < 4 * 3600 ? ["min", 60] : ["h", 3600];

  const scaleOf = (chart) => (chart.x === "time (s)" ? seconds : 1);

  /** A line and, behind it, the band of a series of several runs; or a row of marks. */
  function datasets(chart, { series, points }) {
    const hue = hueOf(series);
    const column = (place) => points.map((point) => ({ x: point[0] / scaleOf(chart), y: point[place] }));
    const marked = chart.x !== "step" || points.length === 1;
    const line = {
      label: labels[series],
      data: column(1),
      showLine: chart.y !== "",
      borderColor: color(hue, 1),
      backgroundColor: color(hue, chart.y ? 1 : 0.4),
      borderWidth: chart.y ? 2.5 : 1.5,
      borderDash: chart.y ? dashes[series % dashes.length] : [],
      pointStyle: markers[series % markers.length],
      pointBorderColor: color(hue, 1),
      pointRadius: marked ? 4 : 0,
      pointHitRadius: 8,
    };
    const edge = { isAid: true, borderWidth: 0, pointRadius: 0, backgroundColor: color(hue, 0.18) };
    const band = chart.y && points[0].length > 2 ? [{ ...edge, data: column(2), fill: "+1" }, { ...edge, data: column(3) }] : [];
    return [line, ...band].map((dataset) => ({ ...dataset, hidden: hidden.has(series) }));
  }

  function targets(chart) {
    const end = last(chart) / scaleOf(chart);
    const line = { label: "target", isAid: true, borderColor: style("ink"), borderWidth: 1, borderDash: [6, 4], pointRadius: 0 };
    return chart.targets.map((y) => ({ ...line, data: [{ x: 0, y }, { x: end, y }] }));
  }

  function options(chart) {
    const [ink, soft, grid, card] = ["ink", "soft", "grid", "card"].map(style);
    const axis = (text) => ({
      type: "linear",
      title: { display: true, text, color: soft },
      ticks: { color: soft, maxRotation: 0, autoSkipPadding: 16 },
      grid: { color: grid },
      border: { color: grid },
    });
    const x = axis(chart.x === "time (s)" ? `time on the clock (${unit})` : chart.x);
    if (chart.x !== "time (s)") x.ticks.precision = 0;
    Object.assign(x, chart.y || chart.x === "epoch" ? { min: 0, suggestedMax: 2 } : { grace: "5%" });
    const y = chart.y
      ? { ...axis(chart.y), min: 0, suggestedMax: Math.max(0, ...chart.targets) * 1.1 }
      : { ...axis(""), display: false, min: -0.6, max: labels.length - 0.4, reverse: true };
    const tooltip = {
      backgroundColor: ink,
      titleColor: card,
      bodyColor: card,
      usePointStyle: true,
      filter: ({ dataset }) => !dataset.isAid,
      callbacks: { label: ({ dataset, formattedValue }) => ` ${dataset.label}${chart.y ? `: ${formattedValue}` : ""}` },
    };
    return {
      animation: false,
      maintainAspectRatio: false,
      interaction: chart.y ? { mode: "nearest", axis: "x", intersect: false } : { mode: "nearest" },
      scales: { x, y },
      plugins: { legend: { display: false }, tooltip },
    };
  }

  function draw() {
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    for (const chart of drawn.splice(0)) chart.destroy();
    document.querySelectorAll("canvas").forEach((canvas, number) => {
      const chart = charts[number];
      const data = { datasets: [...chart.lines.flatMap((line) => datasets(chart, line)), ...targets(chart)] };
      drawn.push(new Chart(canvas, { type: "line", data, options: options(chart) }));
    });
  }

  draw();
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const series = Number(button.dataset.series);
      hidden.delete(series) || hidden.add(series);
      button.setAttribute("aria-pressed", String(!hidden.has(series)));
      draw();
    });
  }
})();
