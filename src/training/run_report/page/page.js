"use strict";
(() => {
  const root = document.documentElement;
  const stored = (value) => {
    try {
      if (value !== undefined) localStorage.setItem("theme", value);
      return localStorage.getItem("theme");
    } catch { return null; } // a file: page may have no storage
  };

  // Colours: those of the system until others are chosen.
  const button = document.getElementById("theme");
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => { button.textContent = dark() ? "Light colours" : "Dark colours"; };
  if (stored()) root.dataset.theme = stored();
  label();
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; stored(root.dataset.theme); label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);

  // Charts: a slider, and the pointer, choose a place on the x axis, and the values there are written below.
  const number = (value) => value === null ? "–" : Number(value.toPrecision(4)).toString();
  const nearest = (values, x) => {
    let low = 0, high = values.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (values[middle] < x) low = middle + 1; else high = middle; }
    return low > 0 && x - values[low - 1] < values[low] - x ? low - 1 : low;
  };
  for (const figure of document.querySelectorAll("figure")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const svg = figure.querySelector("svg"), slider = figure.querySelector("input"), out = figure.querySelector(".readout");
    const [left, right, top, bottom] = data.frame, [from, to] = data.limits;
    const places = [...new Set(data.series.flatMap((series) => series.x))].sort((a, b) => a - b);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", top);
    cursor.setAttribute("y2", bottom);
    cursor.setAttribute("visibility", "hidden");
    svg.append(cursor);
    slider.max = places.length - 1;
    const show = () => {
      const x = places[slider.value], at = left + (right - left) * (x - from) / (to - from);
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      cursor.setAttribute("visibility", "visible");
      const values = data.series.map((series) => `${series.name} ${number(series.y[nearest(series.x, x)])}`);
      out.textContent = `${data.x} ${number(x)}: ${values.join(", ")}`;
      slider.setAttribute("aria-valuetext", out.textContent);
    };
    slider.value = places.length - 1;
    show();
    slider.addEventListener("input", show);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const at = (event.clientX - box.left) / box.width * view.width;
      slider.value = nearest(places, from + (to - from) * (at - left) / (right - left));
      show();
    });
  }

  // A served page looks for a newer one, unless it is told not to.
  const refresh = document.getElementById("refresh");
  if (!refresh) return;
  let on = true;
  refresh.addEventListener("click", () => {
    on = !on;
    refresh.setAttribute("aria-pressed", on);
  });
  setInterval(async () => {
    if (!on || document.hidden) return;
    try {
      const answer = await fetch("signature", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== document.body.dataset.signature) location.reload();
    } catch { /* the server is gone; the page stays */ }
  }, 5000);
})();
