"use strict";
const [text, subject, problem, order, outlines, count] = ["text", "subject", "problem", "order", "outlines", "count"].map((id) => document.getElementById(id));
const form = document.querySelector("form");
const list = document.getElementById("cards");
const { folder, cards } = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 24; // cards; whole rows of one to four columns
const NEAR = "1500px"; // above and below what is in sight
const ALIKE = "How much the loser's subject looks like the winner's: a cosine";
const NO_IMAGE = "nothing to show";
let shown = []; // the cards that fit the filters
let chunks = []; // the elements of their chunks, of which those near the sight are filled
let selection; // the filters that they fit

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null)); // as text, whatever markup it has
  return element;
}

function figure([caption, colour, width, height, image, outlines]) {
  const address = (name) => `${folder}/${name}`;
  const stack = image ? make("button", { type: "button", className: "stack enlarge" }) : make("div", { className: "stack" });
  if (image) stack.append(make("img", { loading: "lazy", width, height, alt: caption, src: address(image) }));
  else stack.append(make("span", { className: "missing", textContent: NO_IMAGE }));
  if (outlines) stack.append(make("img", { className: "outlines", loading: "lazy", alt: "", src: address(outlines) }));
  const swatch = colour && make("i", { className: "swatch" });
  if (swatch) swatch.style.background = colour;
  const element = make("figure", {}, stack, make("figcaption", {}, swatch, caption));
  element.style.setProperty("--ratio", width / height);
  return element;
}

function complaint([severity, field, message, remedy]) {
  const end = remedy ? ["; ", make("em", {}, remedy)] : [];
  return make("li", { className: severity }, make("b", {}, severity), " ", make("code", {}, field), ` ${message}`, ...end);
}

function article(card) {
  const { file, place, prompt, references, targets, problems, resemblance } = card;
  const alike = resemblance === null ? null : make("span", { className: "alike", title: ALIKE }, ` ${resemblance.toFixed(2)}`);
  const heading = make("h2", {}, make("span", { className: "place", title: file }, place), ` ${prompt}`, alike);
  const pictures = (className, items) => make("div", { className }, ...items.map(figure));
  const shows = targets.length > 0;
  const row = shows ? make("div", { className: "pictures" }, pictures("references", references), pictures("targets", targets)) : null;
  const faults = problems.length ? make("ul", {}, ...problems.map(complaint)) : null;
  return Object.assign(make("article", { tabIndex: -1 }, heading, row, faults), { card });
}

// What is searched: all that a card shows.
function words(card) {
  const captions = [...card.references, ...card.targets].flatMap(([caption, , , , image]) => (image ? [caption] : [caption, NO_IMAGE]));
  return (card.words ??= [card.place, card.prompt, ...captions, ...card.problems.flat()].join("\n").toLowerCase());
}

// A browser cannot lay out ten thousand cards at once: a chunk far from the sight is a gap as high as it was, or as others are.
const near = new IntersectionObserver(
  (entries) => entries.forEach(({ isIntersecting, target }) => (isIntersecting ? fill(target) : empty(target))),
  { rootMargin: `${NEAR} 0px` },
);
const cardsOf = (chunk) => shown.slice(CHUNK * chunk.index, CHUNK * (chunk.index + 1));

function fill(chunk) {
  if (chunk.childElementCount) return;
  chunk.replaceChildren(...cardsOf(chunk).map(article));
  chunk.style.height = "";
}

function empty(chunk) {
  if (!chunk.childElementCount || chunk.contains(document.activeElement)) return;
  chunk.style.height = `${chunk.offsetHeight}px`;
  chunk.replaceChildren();
}

function guessHeights() {
  const known = chunks.find((chunk) => chunk.childElementCount);
  if (!known) return;
  const each = known.offsetHeight / cardsOf(known).length;
  for (const chunk of chunks) if (!chunk.childElementCount) chunk.style.height = `${each * cardsOf(chunk).length}px`;
}

function lay() {
  near.disconnect();
  chunks = Array.from({ length: Math.ceil(shown.length / CHUNK) }, (_, index) => make("div", { className: "chunk", index }));
  list.replaceChildren(...chunks);
  if (chunks.length) fill(chunks[0]);
  guessHeights();
  for (const chunk of chunks) near.observe(chunk);
}

function show() {
  document.body.classList.toggle("plain", !outlines.checked);
  const chosen = JSON.stringify([text.value, subject.value, problem.value, order.value]);
  if (chosen === selection) return;
  if (selection !== undefined) scrollTo(0, 0);
  selection = chosen;
  const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = cards.filter(
    (card) =>
      (subject.value === "*" || card.classes.includes(subject.value)) &&
      (problem.value === "*" || card.kinds.includes(problem.value)) &&
      wanted.every((word) => words(card).includes(word)),
  );
  if (order.value === "alike") shown.sort((one, other) => (other.resemblance ?? -2) - (one.resemblance ?? -2));
  const all = `${cards.length} pair${cards.length === 1 ? "" : "s"}`;
  count.textContent = shown.length === cards.length ? all : `${shown.length} of ${all}`;
  document.getElementById("nothing").hidden = shown.length > 0;
  lay();
}

// The filters are in the address, so that a selection can be kept, and a reload shows it again.
function keep() {
  const chosen = Object.entries({ text: text.value, subject: subject.value, problem: problem.value, order: order.value });
  const state = new URLSearchParams(chosen.filter(([name, value]) => value !== (name === "text" ? "" : "*")));
  history.replaceState(null, "", `#${state}`);
  show();
}

function restore() {
  const state = new URLSearchParams(location.hash.slice(1));
  text.value = state.get("text") ?? "";
  for (const select of [subject, problem, order]) {
    const value = state.get(select.id);
    select.value = [...select.options].some((option) => option.value === value) ? value : "*";
  }
  show();
}

function step(by) {
  const current = document.activeElement.closest("article")?.card;
  const top = document.querySelector("header").offsetHeight;
  const from = current ?? [...list.querySelectorAll("article")].find((one) => one.getBoundingClientRect().top >= top)?.card;
  const next = shown.indexOf(from) + (current ? by : 0);
  const index = Math.max(0, Math.min(next, shown.length - 1));
  const chunk = chunks[Math.floor(index / CHUNK)];
  if (!chunk) return;
  fill(chunk);
  chunk.children[index % CHUNK].focus();
}

form.addEventListener("input", keep);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(keep)); // the fields change after the event
addEventListener("hashchange", restore);
addEventListener("resize", guessHeights);
addEventListener("beforeprint", () => {
  near.disconnect(); // paper has all of the selection
  chunks.forEach(fill);
});
addEventListener("afterprint", lay);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (event.repeat) return; // held down, it has closed an enlarged picture
    document.activeElement.blur();
    return form.reset();
  }
  if (event.target.matches("input[type=search], select")) return;
  const action = { "/": () => text.focus(), j: () => step(1), k: () => step(-1), o: () => outlines.click() }[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});
restore();
