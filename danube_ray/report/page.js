// The charts' cursor: the values at the nearest logged step, by mouse, touch or arrow keys. The page is whole without it.
for (const chart of document.querySelectorAll(".chart")) {
  const { at, heads, rows } = JSON.parse(chart.querySelector("script").textContent);
  const over = chart.querySelector(".over"), cursor = chart.querySelector(".cursor"), readout = chart.querySelector(".readout");
  let index = at.length - 1;

  const line = (label, color, value) => {
    const row = document.createElement("div"), swatch = document.createElement("i"), text = document.createElement("b");
    swatch.style.background = color || "transparent";
    text.textContent = value;
    row.append(swatch, label, text);
    return row;
  };
  const show = (wanted) => {
    index = Math.max(0, Math.min(at.length - 1, wanted));
    const head = document.createElement("p");
    head.textContent = heads[index];
    readout.replaceChildren(head, ...rows.filter((row) => row.values[index])
      .map((row) => line(row.label, row.color, row.values[index])));
    cursor.style.left = 100 * at[index] + "%";
    cursor.hidden = readout.hidden = false;
    const box = over.getBoundingClientRect(), home = chart.getBoundingClientRect();
    const x = box.left - home.left + at[index] * box.width;
    const right = x + 14 + readout.offsetWidth <= home.width;
    readout.style.left = Math.max(0, right ? x + 14 : x - 14 - readout.offsetWidth) + "px";
  };
  const hide = () => { cursor.hidden = readout.hidden = true; };

  const point = (event) => {
    const box = over.getBoundingClientRect(), x = (event.clientX - box.left) / box.width;
    const next = at.findIndex((place) => place >= x), after = next < 0 ? at.length - 1 : next;
    show(after > 0 && x - at[after - 1] < at[after] - x ? after - 1 : after);
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") hide();
    if (move) { event.preventDefault(); show(cursor.hidden ? index : index + move); }
  });
}

// The page of an unfinished run reads itself again, unless the reader has something open in it.
const { renewS } = document.body.dataset;
if (renewS) setInterval(() => { if (!document.querySelector("details[open]")) location.reload(); }, 1000 * renewS);
