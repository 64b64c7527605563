"use strict";
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const filters = document.querySelector(".filters");
  // As in page.html's swatches: what tells runs apart without colour.
  const markers = ["circle", "rect", "triangle", "rectRot", "cross", "crossRot"];
  const dashes = [[], [7, 3], [2, 2], [9, 3, 2, 3]];
  const drawn = new Map();

  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const labels = new Map(runs.map((run) => [run.number, run.label]));

  /** What the reader has chosen to see: numbers of runs, and a subset ("" for each by itself). */
  function chosen() {
    const boxes = [...document.querySelectorAll("input[name=run]")];
    const shown = boxes.length ? boxes.filter((box) => box.checked).map((box) => Number(box.value)) : [...labels.keys()];
    return { shown: new Set(shown), subset: document.querySelector("select[name=subset]")?.value ?? "all" };
  }

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

  function dataset(series, subsets) {
    const index = series.run - 1;
    const ink = colour(`run-${(index % 8) + 1}`);
    // Lines of one run's subsets differ by their dashes; elsewhere those of runs do.
    const dash = series.subset === null || subsets.length < 2 ? index : subsets.indexOf(series.subset);
    const of = subsets.length > 1 ? ` · ${series.subset === "all" ? "all utterances" : series.subset}` : "";
    return {
      label: labels.get(series.run) + of,
      data: series.points.map(([x, y]) => ({ x, y })),
      borderColor: series.faint ? `${ink}38` : ink,
      backgroundColor: ink,
      borderWidth: series.faint ? 1 : 2,
      borderDash: series.faint ? [] : dashes[dash % dashes.length],
      pointStyle: markers[index % markers.length],
      pointRadius: series.markers ? 4 : 0,
      pointHitRadius: series.faint ? 0 : 8,
      faint: series.faint,
      order: series.faint ? 1 : 0,
    };
  }

  function options(chart, legend) {
    const [ink, soft, grid, card] = ["ink", "soft", "grid", "card"].map(colour);
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
    if (!chart.logarithmic) Object.assign(y, { min: 0, suggestedMax: Math.max(0, ...chart.targets) * 1.1 });
    return {
      animation: false,
      maintainAspectRatio: false,
      devicePixelRatio: Math.max(2, window.devicePixelRatio), // sharp on paper too
      interaction: { mode: "nearest", axis: "x", intersect: false },
      scales: { x, y },
      plugins: {
        legend: { display: legend, position: "bottom", labels: { usePointStyle: true, color: ink } },
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
    const { shown, subset } = chosen();
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    for (const chart of charts) {
      const series = chart.series.filter(
        (each) => shown.has(each.run) && (each.subset === null || subset === "" || each.subset === subset),
      );
      const subsets = [...new Set(series.map((each) => each.subset))];
      drawn.get(chart.id)?.destroy();
      drawn.set(
        chart.id,
        new Chart(document.getElementById(chart.id), {
          type: "line",
          data: { datasets: series.map((each) => dataset(each, subsets)) },
          options: options(chart, subsets.length > 1),
          plugins: [target],
        }),
      );
    }
  }

  function filter() {
    const { shown, subset } = chosen();
    for (const element of document.querySelectorAll("[data-run]")) element.hidden = !shown.has(Number(element.dataset.run));
    for (const element of document.querySelectorAll("[data-subset]")) {
      element.hidden = subset !== "" && subset !== "all" && element.dataset.subset !== subset;
    }
    if (filters) filters.querySelector(".status").textContent = labels.size > 1 ? `${shown.size} of ${labels.size} runs shown` : "";
    draw();
  }

  // A browser restores the boxes of a page that is loaded again.
  filter();
  filters?.addEventListener("change", filter);
  filters?.addEventListener("submit", (event) => event.preventDefault());
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  // Paper is white, whatever the screen is, and nothing on it can be opened.
  const opened = [];
  window.addEventListener("beforeprint", () => {
    opened.push(...document.querySelectorAll("details:not([open])"));
    for (const details of opened) details.open = true;
    root.classList.add("print");
    draw();
  });
  window.addEventListener("afterprint", () => {
    for (const details of opened.splice(0)) details.open = false;
    root.classList.remove("print");
    draw();
  });
})();
