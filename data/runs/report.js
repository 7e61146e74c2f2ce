"use strict";
{
const { frame: [LEFT, RIGHT, TOP, BOTTOM], ranges, charts, noisy, names, styles, curves } =
  JSON.parse(document.getElementById("data").textContent);
const figures = [...document.querySelectorAll("figure")], axes = Object.keys(ranges);
const on = (id) => document.getElementById(id)?.checked ?? true;
let cursor = 1;  // where the read-outs are, as a share of the x axis

function exact(value) {
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e15)) return value.toExponential(2).replace("e+", "e");
  return value.toLocaleString("en", size < 1000 ? { maximumSignificantDigits: 5 } : { maximumFractionDigits: 0 });
}

function read(figure) {
  const axis = axes.findIndex(on), [left, right] = ranges[axes[axis]], x = left + cursor * (right - left);
  const away = (point) => Math.abs(point[axis] - x);
  const closest = (points) => points.reduce((a, b) => away(b) < away(a) ? b : a, points[0]);
  const nearest = curves.flatMap((curve, run) => Object.entries(charts[figure.dataset.chart]).map(([key, name]) => {
    // of a noisy curve its running mean where that alone is shown
    const shown = noisy.includes(key) ? on("batch") || on("mean") : on(key);
    const mean = noisy.includes(key) && !on("batch");
    const points = on("run" + run) && shown ? curve[key].filter((point) => point[axis] !== null) : [];
    return { run, name: mean ? name + " (mean)" : name, style: styles[run][key], at: mean ? 4 : 3, point: closest(points) };
  })).filter(({ point }) => point);
  const point = closest(nearest.map(({ point }) => point));
  const at = point ? LEFT + (point[axis] - left) / (right - left) * (RIGHT - LEFT) : LEFT;
  for (const line of figure.querySelectorAll(".cursor")) line.setAttribute("d", `M${at} ${TOP}V${BOTTOM}`);
  const span = (text, kind) => Object.assign(document.createElement("span"), { textContent: text, className: kind });
  figure.querySelector("output").replaceChildren(
    span(point ? `${axes[axis]} ${exact(point[axis])}` : "nothing shown", ""),
    ...nearest.map(({ run, name, style, at, point: { [axis]: where, [at]: value } }) => span(
      (names.length > 1 ? `${names[run]}, ` : "") + `${name} ${exact(value)}`
      + (where === point[axis] ? "" : ` (at ${exact(where)})`), style)));
}

function move(share) {
  cursor = Math.min(Math.max(share, 0), 1);
  figures.forEach(read);
}

for (const svg of document.querySelectorAll("figure svg")) {
  for (const event of ["pointermove", "pointerdown"]) svg.addEventListener(event, ({ clientX }) => {
    const { left, width } = svg.getBoundingClientRect();
    move(((clientX - left) / width * svg.viewBox.baseVal.width - LEFT) / (RIGHT - LEFT));
  });
  svg.addEventListener("keydown", ({ key }) => move(cursor + ({ ArrowLeft: -0.01, ArrowRight: 0.01 }[key] ?? 0)));
}
for (const form of document.querySelectorAll("form")) form.addEventListener("input", () => move(cursor));
move(cursor);

for (const list of document.querySelectorAll(".samples")) {
  const slider = list.querySelector("input"), articles = [...list.querySelectorAll("article")];
  const show = () => {
    articles.forEach((article, i) => article.classList.toggle("past", i !== +slider.value));
    slider.setAttribute("aria-valuetext", articles[+slider.value].querySelector("h4").textContent);
  };
  slider.addEventListener("input", show);
  show();
}
document.body.classList.add("scripted");
}
