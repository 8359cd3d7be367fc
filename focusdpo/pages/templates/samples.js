"use strict";
const dialog = document.querySelector("dialog");
const links = [...document.querySelectorAll("figure a")];
let shown = 0; // the place of the enlarged picture

function enlarge(place) {
  shown = (place + links.length) % links.length;
  const [image, caption] = [dialog.querySelector("img"), dialog.querySelector("figcaption")];
  image.src = links[shown].href;
  image.alt = caption.textContent = links[shown].querySelector("img").alt;
  if (!dialog.open) dialog.showModal();
}

document.querySelector("main").addEventListener("click", (event) => {
  const link = event.target.closest("figure a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window is the browser's affair
  event.preventDefault();
  enlarge(links.indexOf(link));
});
dialog.addEventListener("click", () => dialog.close());
dialog.addEventListener("close", () => links[shown].focus());
addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!dialog.open || !step) return;
  event.preventDefault();
  enlarge(shown + step);
});
