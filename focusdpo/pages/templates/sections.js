"use strict";
const plots = [...document.querySelectorAll(".plot")].map((element) => ({
  element,
  canvas: element.querySelector(".canvas"),
  drawn: false,
}));
const BUTTONS = [["toImage"], ["zoom2d", "pan2d"], ["resetScale2d"]];
const ranges = {}; // of x, by the name of a group of plots: what a plot that is drawn later starts with

function colour(name) {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = `var(${name})`; // resolves light-dark()
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

function look() {
  const [text, quiet, line, card] = ["--text", "--quiet", "--line", "--card"].map(colour);
  const axis = { gridcolor: line, zerolinecolor: line, linecolor: line, tickcolor: line, automargin: true };
  return {
    layout: {
      paper_bgcolor: "#0000",
      plot_bgcolor: "#0000",
      font: { color: text, family: "system-ui, sans-serif", size: 12 },
      xaxis: { ...axis, title: { font: { color: quiet } } },
      yaxis: { ...axis, title: { font: { color: quiet } } },
      hoverlabel: { bgcolor: card, bordercolor: line, font: { color: text } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "#0000" },
      modebar: { bgcolor: "#0000", color: quiet, activecolor: text },
      margin: { l: 48, r: 12, t: 12, b: 36 },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
      hovermode: "x",
    },
  };
}

async function draw(plot) {
  if (plot.drawn) return;
  plot.drawn = true;
  try {
    const { data, layout } = JSON.parse(plot.element.querySelector("script").textContent);
    plot.group = layout.meta?.x;
    layout.template = look();
    layout.xaxis = { ...layout.xaxis, ...(ranges[plot.group] && { range: ranges[plot.group], autorange: false }) };
    const image = { filename: plot.element.id, scale: 2 };
    // By default plotly has a button that sends the data to a server of its own.
    const alone = { showSendToCloud: false, plotlyServerURL: "", modeBarButtons: BUTTONS };
    const options = { ...alone, displaylogo: false, toImageButtonOptions: image };
    await Plotly.newPlot(plot.canvas, data, layout, options);
    plot.height = plot.canvas.offsetHeight;
    await fit(plot);
    plot.canvas.on("plotly_relayout", (change) => follow(plot, change));
  } catch (error) {
    plot.canvas.classList.add("failed");
    plot.canvas.textContent = `This plot could not be drawn: ${error.message}`;
    console.error(error);
  }
}

// On a narrow screen a legend takes many rows, which it gets beside the plot's own height.
async function fit(plot) {
  const resize = (height) => {
    plot.canvas.style.height = `${height}px`;
    return Plotly.Plots.resize(plot.canvas);
  };
  await resize(plot.height); // in which the legend takes the rows that the width asks for
  await resize(plot.height + (plot.canvas.querySelector(".legend .bg")?.height.baseVal.value ?? 0));
}

// Plots of a group show the same stretch of x.
function follow(plot, change) {
  if (plot.group === undefined || plot.following) return;
  const range = change["xaxis.range"] ?? [change["xaxis.range[0]"], change["xaxis.range[1]"]];
  if (change["xaxis.autorange"]) ranges[plot.group] = null;
  else if (range[0] !== undefined) ranges[plot.group] = [...range];
  else return;
  const wanted = ranges[plot.group] ? { "xaxis.range": ranges[plot.group] } : { "xaxis.autorange": true };
  for (const other of plots) {
    if (other === plot || other.group !== plot.group || !other.canvas.layout) continue;
    other.following = true;
    Plotly.relayout(other.canvas, { ...wanted }).finally(() => (other.following = false));
  }
}

const nearby = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (isIntersecting) draw(plots.find((plot) => plot.element === target));
    }
  },
  { rootMargin: "400px" },
);
for (const plot of plots) nearby.observe(plot.element);
let turning; // a phone is turned, or a window's edge moved
addEventListener("resize", () => {
  clearTimeout(turning);
  turning = setTimeout(() => plots.filter((plot) => plot.canvas.layout).forEach(fit), 100);
});
addEventListener("beforeprint", () => plots.forEach(draw));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const plot of plots) if (plot.canvas.layout) Plotly.relayout(plot.canvas, { template: look() });
});

// A film shows one of its shots, which slider, thumbnails and arrow keys choose.
for (const film of document.querySelectorAll(".film")) {
  const shots = [...film.querySelectorAll(".shot")];
  const frames = [...film.querySelectorAll(".frames button")];
  const slider = film.querySelector("input");
  const label = film.querySelector("output");
  const show = (index) => {
    slider.value = index;
    shots.forEach((shot, i) => (shot.hidden = i !== index));
    frames.forEach((frame, i) => (i === index ? frame.setAttribute("aria-current", "true") : frame.removeAttribute("aria-current")));
    label.textContent = shots[index].dataset.label;
  };
  slider.addEventListener("input", () => show(Number(slider.value)));
  frames.forEach((frame, i) => frame.addEventListener("click", () => show(i)));
  show(shots.length - 1);
}

const links = [...document.querySelectorAll("nav a")];
const seen = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) target.inSight = isIntersecting;
    const first = sections.find((section) => section.inSight);
    for (const link of links) link.classList.toggle("here", link.hash === `#${first?.id}`);
  },
  { rootMargin: "0px 0px -60% 0px" },
);
const sections = [...document.querySelectorAll("main > section")];
for (const section of sections) seen.observe(section);
