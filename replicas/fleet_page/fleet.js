"use strict";
// Asks for the fleet's JSON once a second and draws it. Counters run from the engines' start; the curve and the
// strips of compactions begin when the page is opened.

const POLL_MS = 1000;
const TIMEOUT_MS = 5000;
const MOST_SECONDS = 180; // of the past that are shown; at first fewer, so that the picture is never empty
const LEAST_SECONDS = 30;
const GAP_SECONDS = 6; // after more without an answer (a pause, a tab that slept) it is not known when things happened
const RING_MS = 1600;
const MOST_SQUARES = 448;

// How a block is drawn: filled, framed, hatched or empty, so that it is told apart without colour as well.
const KINDS = [
  { key: "pinned", name: "pinned prompt", colour: "--pinned", look: "filled" },
  { key: "live", name: "live", colour: "--live", look: "filled" },
  { key: "predicted", name: "may still be taken by running requests", colour: "--live", look: "framed" },
  { key: "reserved", name: "reserved for requests on their way", colour: "--reserved", look: "hatched" },
  { key: "free", name: "free", colour: "--track", look: "filled" },
];

const $ = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const number = new Intl.NumberFormat("en");
const history = []; // {at, live, without, capacity}
const cards = new Map(); // replica -> its card
let paused = false;
let round = 0; // of asking; a pause ends it, so that an answer on its way starts no second one
let lastFleet = null;

// -- reading ---------------------------------------------------------------------------------------------------

async function poll(mine) {
  try {
    const response = await fetch(location.pathname, {
      headers: { Accept: "application/json" }, cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const fleet = await response.json();
    if (mine !== round) return;
    show(fleet, Date.now() / 1000);
    connection("live");
  } catch {
    if (mine !== round) return;
    connection("lost");
  }
  setTimeout(() => mine === round && poll(mine), POLL_MS);
}

/** Blocks of one replica by what they are used for; they add up to its pool. */
function blocksOf(replica) {
  const { total_blocks: total, free_blocks: free, pinned_blocks } = replica.engine;
  const held = total - free;
  const pinned = Math.min(pinned_blocks, held);
  const predicted = Math.min(replica.predicted_blocks, free);
  const reserved = Math.min(replica.reserved_blocks, free - predicted);
  return { pinned, live: held - pinned, predicted, reserved, free: free - predicted - reserved };
}

/** Whether anything new is placed there. */
const takesRequests = (replica) => replica.fresh && !replica.draining;

const sum = (items, value) => items.reduce((total, item) => total + value(item), 0);

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) { count /= 1024; at += 1; }
  return [count.toLocaleString("en", { maximumFractionDigits: count < 10 && at ? 1 : 0 }), units[at]];
}

// -- drawing: the whole fleet ------------------------------------------------------------------------------------

function show(fleet, at) {
  const { replicas } = fleet;
  const silent = replicas.filter((replica) => !replica.fresh);
  announceSilence(silent);
  lastFleet = fleet;
  $("subtitle").textContent = `${fleet.model}, ${count(replicas.length, "replica")}` +
    (silent.length ? `, ${silent.length} silent` : "");
  figures(fleet);
  history.push({
    at,
    live: sum(replicas, (r) => r.held_blocks),
    without: sum(replicas, (r) => r.engine.uncompressed_blocks),
    capacity: sum(replicas, (r) => r.engine.total_blocks),
  });
  while (history[0].at < at - MOST_SECONDS) history.shift();
  curve(at);
  const gone = new Set(cards.keys());
  for (const replica of replicas) {
    gone.delete(replica.replica);
    if (!cards.has(replica.replica)) cards.set(replica.replica, new Card(replica));
    cards.get(replica.replica).update(replica, at);
  }
  for (const name of gone) { cards.get(name).element.remove(); cards.delete(name); }
  const most = Math.max(1, ...replicas.map((replica) => blocksPerSquare(replica.engine.total_blocks)));
  $("square").textContent = most === 1 ? "one KV block" : `up to ${most} KV blocks`;
  table(replicas);
}

const count = (n, noun) => `${number.format(n)} ${noun}${n === 1 ? "" : "s"}`;

function figures(fleet) {
  const { replicas } = fleet;
  const total = (name) => sum(replicas, (replica) => replica.engine[name]);
  const [size, unit] = bytes(sum(replicas, (r) => r.engine.freed_blocks * r.engine.bytes_per_block));
  figure("reclaimed", size, unit, `${count(total("freed_blocks"), "freed block")} so far`);
  const stranded = total("stranded_slots");
  figure("compactions", number.format(total("compactions")), "",
    stranded ? `${count(stranded, "stranded slot")}: a defect` : count(total("evicted_tokens"), "evicted token"));
  const waiting = sum(Object.values(fleet.queue_length), Number) + total("waiting");
  figure("running", number.format(total("running")), "decode",
    waiting ? `${number.format(waiting)} wait for room` : "none wait");
  const pool = total("total_blocks");
  const headroom = sum(replicas, (replica) => (takesRequests(replica) ? Math.max(0, replica.headroom_blocks) : 0));
  figure("headroom", pool ? String(Math.round((100 * headroom) / pool)) : "–", pool ? "%" : "",
    `${number.format(headroom)} of ${count(pool, "block")} can be promised`);
  const idle = replicas.length > 0 && !total("running") && !total("compactions");
  $("try").hidden = !idle;
  if (idle) {
    const body = JSON.stringify({ model: fleet.model, messages: [{ role: "user", content: "Hello" }] });
    $("curl").textContent =
      `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json' -d '${body}'`;
  }
}

function figure(id, value, unit, note) {
  const small = document.createElement("small");
  small.textContent = unit;
  $(id).replaceChildren(value, ...(unit ? [small] : []));
  $(`${id}-note`).textContent = note;
}

const shownSeconds = (now) => Math.min(MOST_SECONDS, Math.max(LEAST_SECONDS, now - history[0].at));

/** Time runs to the right; the newest second is at the right edge. */
function curve(now) {
  const svg = $("curve");
  const { width, height } = svg.getBoundingClientRect();
  const left = 46, right = 8, top = 8, bottom = 20;
  const most = niceAbove(Math.max(1, ...history.map((point) => Math.max(point.without, point.capacity, point.live))));
  const seconds = shownSeconds(now);
  const x = (at) => left + ((at - now + seconds) / seconds) * (width - left - right);
  const y = (blocks) => height - bottom - (blocks / most) * (height - top - bottom);
  const path = (key, points = history) =>
    points.map((point, i) => `${i ? "L" : "M"}${x(point.at).toFixed(1)},${y(point[key]).toFixed(1)}`).join("");
  const saved = history.map((point) => ({ ...point, roof: Math.max(point.live, point.without) }));
  const back = path("live", [...history].reverse()).replace("M", "L");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const parts = [];
  for (const share of [0, 0.5, 1]) {
    const at = y(most * share);
    parts.push(`<line class="grid" x1="${left}" x2="${width - right}" y1="${at}" y2="${at}"/>`,
      `<text x="${left - 8}" y="${at + 4}" text-anchor="end">${number.format(most * share)}</text>`);
  }
  parts.push(`<text x="${left}" y="${height - 4}">${Math.round(seconds)} seconds ago</text>`,
    `<text x="${width - right}" y="${height - 4}" text-anchor="end">now</text>`);
  parts.push(`<path class="saved" d="${path("roof", saved)}${back}Z"/>`, `<path class="capacity" d="${path("capacity")}"/>`,
    `<path class="without" d="${path("without")}"/>`, `<path class="live" d="${path("live")}"/>`);
  svg.innerHTML = parts.join(""); // numbers and texts of this page only
  const { live, without, capacity } = history[history.length - 1];
  const times = live > 0 && without > live ? `, ${(without / live).toFixed(1)} times as many` : "";
  $("curve-text").textContent = `${number.format(live)} of ${number.format(capacity)} blocks are in use; without ` +
    `compaction the same requests would hold ${number.format(without)}${times}.`;
}

/** The next of 1, 2, 5 times a power of ten, or a half of it, that is not below. */
function niceAbove(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value);
}

function table(replicas) {
  const columns = {
    "Replica": (r) => r.replica,
    "State": (r) => (!r.fresh ? "silent" : r.draining ? "drains" : "reports"),
    "Blocks": (r) => r.engine.total_blocks,
    "Pinned prompt": (r) => blocksOf(r).pinned,
    "Live": (r) => blocksOf(r).live,
    "Free": (r) => r.engine.free_blocks,
    "Reserved": (r) => r.reserved_blocks,
    "Predicted": (r) => r.predicted_blocks,
    "Headroom": (r) => r.headroom_blocks,
    "Without compaction": (r) => r.engine.uncompressed_blocks,
    "Compactions": (r) => r.engine.compactions,
    "Freed": (r) => r.engine.freed_blocks,
    "Decode": (r) => r.engine.running,
  };
  if (!$("columns").children.length) {
    $("columns").replaceChildren(...Object.keys(columns).map((name) => cell("th", name, "col")));
  }
  $("rows").replaceChildren(...replicas.map((replica) => {
    const row = document.createElement("tr");
    row.replaceChildren(...Object.values(columns).map((read, i) => {
      const value = read(replica);
      return cell(i ? "td" : "th", typeof value === "number" ? number.format(value) : value, i ? null : "row");
    }));
    return row;
  }));
}

function cell(tag, text, scope) {
  const made = document.createElement(tag);
  made.textContent = text;
  if (scope) made.scope = scope;
  return made;
}

// -- drawing: one replica ------------------------------------------------------------------------------------------

const blocksPerSquare = (total) => Math.max(1, Math.ceil(total / MOST_SQUARES));

class Card {
  constructor(replica) {
    this.element = document.createElement("article");
    this.element.className = "replica";
    this.element.innerHTML = '<h3><span class="name"></span><span class="state"></span></h3>' +
      '<canvas class="pool" role="img"></canvas><p class="blocks"></p>' +
      '<svg class="strip" role="img" preserveAspectRatio="none"></svg><p class="pace"></p>';
    this.part = (selector) => this.element.querySelector(selector);
    this.part(".name").textContent = `Replica ${replica.replica}`;
    this.part(".name").title = replica.replica;
    this.events = []; // {at, compactions}
    this.since = null; // seconds of which nothing is missing begin here
    this.rings = 0;
    this.ringed = 0;
    this.frame = 0; // that is asked for and has not come; cancelling one that has is no harm
    $("cards").append(this.element);
  }

  update(replica, at) {
    const { engine } = replica;
    const before = this.replica && this.replica.epoch === replica.epoch ? this.replica.engine : engine;
    const compactions = engine.compactions - before.compactions;
    const freed = engine.freed_blocks - before.freed_blocks;
    this.replica = replica;
    const last = this.events.at(-1);
    const isGap = !last || at - last.at > GAP_SECONDS;
    if (isGap) this.since = at;
    this.events.push({ at, compactions: isGap ? 0 : compactions });
    while (this.events[0].at < at - MOST_SECONDS) this.events.shift();
    if (freed > 0) { this.rings = freed; this.ringed = performance.now(); }
    this.element.classList.toggle("silent", !replica.fresh);
    this.part(".state").textContent = replica.fresh
      ? `${replica.draining ? "drains, " : ""}${number.format(engine.running)} decode`
      : `silent for ${Math.round(replica.report_age_seconds)} s`;
    const blocks = blocksOf(replica);
    const held = blocks.pinned + blocks.live;
    this.part(".blocks").innerHTML = `<b>${number.format(held)}</b> of ${number.format(engine.total_blocks)} blocks ` +
      `in use, headroom <b>${number.format(replica.headroom_blocks)}</b>`; // numbers only
    this.part(".pool").setAttribute("aria-label", `Block pool: ${KINDS.map(({ key, name }) =>
      `${blocks[key]} ${name}`).join(", ")}.`);
    this.strip(at);
    this.draw();
  }

  strip(now) {
    const svg = this.part(".strip");
    const most = Math.max(4, ...this.events.map((event) => event.compactions));
    const seconds = shownSeconds(now);
    svg.setAttribute("viewBox", `0 0 ${seconds} ${most}`);
    svg.innerHTML = this.events.filter((event) => event.compactions > 0).map((event) =>
      `<rect x="${(event.at - now + seconds - 1).toFixed(2)}" y="${most - event.compactions}" width="0.7" ` +
      `height="${event.compactions}"/>`).join("");
    const seen = Math.max(1, Math.min(60, Math.round(now - this.since)));
    const recent = sum(this.events.filter((event) => event.at > now - seen), (event) => event.compactions);
    const text = `${count(recent, "compaction")} in the last ${seen === 60 ? "minute" : count(seen, "second")}`;
    svg.setAttribute("aria-label", `Compactions by second: ${text}.`);
    const [size, unit] = bytes(this.replica.engine.freed_blocks * this.replica.engine.bytes_per_block);
    this.part(".pace").textContent = `${text}; ${size} ${unit} reclaimed so far`;
  }

  /** The pool as squares; while rings fade, drawn again with every frame, and once however often it is called. */
  draw() {
    cancelAnimationFrame(this.frame);
    const canvas = this.part(".pool");
    const { engine } = this.replica;
    const blocks = blocksOf(this.replica);
    const per = blocksPerSquare(engine.total_blocks);
    const squares = KINDS.flatMap((kind) => Array(Math.ceil(blocks[kind.key] / per)).fill(kind));
    squares.length = Math.min(squares.length, Math.ceil(engine.total_blocks / per) + KINDS.length);
    const width = canvas.clientWidth;
    const size = Math.max(7, Math.min(22, Math.floor(Math.sqrt((width * 130) / squares.length))));
    const columns = Math.max(1, Math.floor((width + 2) / size));
    const scale = devicePixelRatio;
    const height = Math.ceil(squares.length / columns) * size;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const age = (performance.now() - this.ringed) / RING_MS;
    const firstFree = squares.findIndex((kind) => kind.key !== "pinned" && kind.key !== "live");
    const lastRinged = firstFree + Math.ceil(this.rings / per);
    squares.forEach((kind, i) => {
      const x = (i % columns) * size, y = Math.floor(i / columns) * size;
      square(pen, style, kind, x, y, size - 2);
      if (age < 1 && firstFree >= 0 && i >= firstFree && i < lastRinged) {
        pen.globalAlpha = calm.matches ? 1 : 1 - age;
        pen.strokeStyle = style.getPropertyValue("--live");
        pen.lineWidth = 1.5;
        pen.strokeRect(x + 0.75, y + 0.75, size - 3.5, size - 3.5);
        pen.globalAlpha = 1;
      }
    });
    if (age < 1 && !calm.matches) this.frame = requestAnimationFrame(() => this.draw());
  }
}

function square(pen, style, { colour, look }, x, y, size) {
  pen.fillStyle = pen.strokeStyle = style.getPropertyValue(colour);
  pen.lineWidth = 1.25;
  if (look === "filled") {
    pen.beginPath();
    pen.roundRect(x, y, size, size, 2);
    pen.fill();
    return;
  }
  pen.beginPath();
  pen.roundRect(x + 0.6, y + 0.6, size - 1.2, size - 1.2, 1.5);
  pen.stroke();
  if (look === "hatched") {
    pen.save();
    pen.clip();
    pen.beginPath();
    for (let at = -size; at < size; at += 3) { pen.moveTo(x + at, y + size); pen.lineTo(x + at + size, y); }
    pen.stroke();
    pen.restore();
  }
}

function legend() {
  const scale = devicePixelRatio;
  const style = getComputedStyle(document.documentElement);
  $("kinds").replaceChildren(...KINDS.map((kind) => {
    const item = document.createElement("li");
    const sample = document.createElement("canvas");
    sample.setAttribute("aria-hidden", "true");
    sample.width = sample.height = 14 * scale;
    const pen = sample.getContext("2d");
    pen.scale(scale, scale);
    square(pen, style, kind, 1, 1, 12);
    item.append(sample, kind.name);
    return item;
  }));
}

// -- state of the page -----------------------------------------------------------------------------------------------

function connection(state) {
  const pill = $("connection");
  if (state === "lost" && !pill.classList.contains("lost")) announce("The fleet does not answer.");
  if (state === "live" && pill.classList.contains("lost")) announce("The fleet answers again.");
  pill.className = `pill ${state}`;
  pill.textContent = { live: "live", lost: "no answer, trying again", paused: "paused" }[state];
}

/** Screen readers hear of changes of state, never of numbers. */
function announce(sentence) {
  $("announcements").textContent = sentence;
}

function announceSilence(silent) {
  const before = new Set((lastFleet ? lastFleet.replicas : []).filter((r) => !r.fresh).map((r) => r.replica));
  const news = silent.filter((replica) => !before.has(replica.replica)).map((replica) => replica.replica);
  if (news.length) announce(`Replica ${news.join(", ")} does not report.`);
}

$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  round += 1;
  if (paused) connection("paused");
  else poll(round);
});

function redraw() {
  legend();
  for (const card of cards.values()) card.draw();
  if (history.length) curve(history[history.length - 1].at);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", redraw);
legend();
poll(round);
