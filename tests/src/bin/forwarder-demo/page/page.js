// Keeps the page's values as the daemon has them now, draws the curve, and shows other clients' ways on the picture.
"use strict";

const SAMPLES = 60;
const PATIENCE = 8000; // milliseconds; a machine that is gone does not answer
const WIDTH = 240;
const HEIGHT = 48;

const by = (id) => document.getElementById(id);
const body = document.body;
const picture = by("picture");

let last = null; // the reading before
const rates = []; // packets per second, newest last
let shown = null; // the row whose way is shown instead of the visitor's own
let own = { client: body.dataset.client, path: body.dataset.path, how: by("how").textContent };

async function refresh() {
  try {
    const answer = await fetch("/status.json", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    if (!answer.ok) throw new Error(answer.statusText);
    show(await answer.json());
    by("pulse").textContent = "live";
    by("pulse").classList.remove("lost");
  } catch {
    by("pulse").textContent = "gone";
    by("pulse").classList.add("lost");
    by("trouble").textContent = "The web server does not answer any more. Has the demonstration ended?";
    picture.classList.remove("moving");
  }
  setTimeout(refresh, 1000);
}

function show(status) {
  // The table of checks was not complete when this page was made.
  if (status.checked && body.dataset.checked === "false") location.reload();
  for (const element of document.querySelectorAll("[data-live]")) {
    const text = status.texts[element.dataset.live];
    if (element.id !== "how" && element.textContent !== text) element.textContent = text;
  }
  own = { client: status.texts["client-kind"], path: status.texts["path-kind"], how: status.texts.how };
  body.dataset.client = own.client;
  body.dataset.path = own.path;
  draw();
  if (status.packets === null) return;
  if (last && last.publish === status.publish && status.milliseconds > last.milliseconds) {
    const seconds = (status.milliseconds - last.milliseconds) / 1000;
    rates.push(Math.max(0, status.packets - last.packets) / seconds);
    if (rates.length > SAMPLES) rates.shift();
    by("rate").textContent = Math.round(rates.at(-1)).toLocaleString("en");
    picture.classList.toggle("moving", status.packets > last.packets);
    curve();
  }
  last = status;
}

function curve() {
  const most = Math.max(10, ...rates);
  const step = WIDTH / (SAMPLES - 1);
  const point = (rate, index) => {
    const x = WIDTH - (rates.length - 1 - index) * step;
    return `${x.toFixed(1)},${(HEIGHT - 2 - (rate / most) * (HEIGHT - 6)).toFixed(1)}`;
  };
  const points = rates.map(point);
  by("curve").setAttribute("points", points.join(" "));
  const first = WIDTH - (rates.length - 1) * step;
  by("area").setAttribute("d", `M${first.toFixed(1)},${HEIGHT} L${points.join(" L")} L${WIDTH},${HEIGHT}Z`);
}

function draw() {
  const way = shown ? shown.dataset : own;
  picture.dataset.client = way.client;
  picture.dataset.path = way.path;
  const cells = shown ? [...shown.cells].map((cell) => cell.textContent) : null;
  by("how").textContent = cells ? `${cells[0]}: connected to ${cells[1]}, seen as ${cells[2]}, by ${cells[3]}.` : own.how;
  by("mine").hidden = !shown;
}

function select(row) {
  if (shown) {
    shown.classList.remove("shown");
    shown.querySelector("button").setAttribute("aria-pressed", "false");
  }
  shown = row === shown ? null : row;
  if (shown) {
    shown.classList.add("shown");
    shown.querySelector("button").setAttribute("aria-pressed", "true");
    picture.scrollIntoView({ block: "nearest" });
  }
  draw();
}

// Each client's name becomes a button that shows its way.
for (const row of document.querySelectorAll(".checks tbody tr")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = row.cells[0].textContent;
  button.setAttribute("aria-pressed", "false");
  button.addEventListener("click", () => select(row));
  row.cells[0].replaceChildren(button);
}
by("mine").addEventListener("click", () => select(null));

by("download").addEventListener("click", async () => {
  const button = by("download");
  button.disabled = true;
  by("downloaded").textContent = "";
  try {
    const began = performance.now();
    const answer = await fetch("/download", { cache: "no-store" });
    const bytes = (await answer.arrayBuffer()).byteLength;
    const seconds = (performance.now() - began) / 1000;
    const speed = (bytes * 8) / seconds / 1e9;
    by("downloaded").textContent = `${(bytes / 1e6).toFixed(1)} MB in ${seconds.toFixed(2)} s, ${speed.toFixed(1)} Gbit/s in this browser`;
  } catch {
    by("downloaded").textContent = "The download broke off.";
  }
  button.disabled = false;
});

by("pulse").hidden = false;
by("load").hidden = false;
by("choose").hidden = false;
refresh();
