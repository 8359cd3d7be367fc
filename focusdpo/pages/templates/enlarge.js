// What has the class "enlarge" shows the pictures within it enlarged when it is clicked; arrow keys go on, Escape and a click end it.
{
  const dialog = Object.assign(document.createElement("dialog"), { id: "enlarged", ariaLabel: "Enlarged picture" });
  dialog.innerHTML = "<figure><div></div><figcaption></figcaption></figure>";
  document.body.append(dialog);
  const [pictures, caption] = [dialog.querySelector("div"), dialog.querySelector("figcaption")];
  let shown; // the element whose pictures are enlarged

  const enlarge = (element) => {
    shown = element;
    const images = [...element.querySelectorAll("img")].filter((image) => image.getClientRects().length);
    pictures.replaceChildren(...images.map(({ src, alt }) => Object.assign(new Image(), { src, alt })));
    caption.textContent = images[0].alt;
    dialog.classList.toggle("sheet", element.classList.contains("sheet"));
    if (!dialog.open) dialog.showModal();
    dialog.scrollTo(0, 0);
  };

  document.addEventListener("click", (event) => {
    const element = event.target.closest(".enlarge");
    if (!element || event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window is the browser's affair
    if (event.detail > 1) return event.preventDefault(); // a double click is one
    event.preventDefault();
    enlarge(element);
  });
  dialog.addEventListener("click", (event) => event.detail > 1 || dialog.close());
  dialog.addEventListener("close", () => shown.focus());
  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the page's own keys rest
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const all = [...document.querySelectorAll(".enlarge")].filter((element) => element.getClientRects().length);
    enlarge(all.at((all.indexOf(shown) + step) % all.length));
  });
}
