// The page of an image server: one form, one drawing at a time, and what the server says of itself.
//
//   GET  v1/status              every 2 s   → header, tiles, and what the form offers
//   POST v1/images/generations  on Draw     → events: dite.progress, image_generation.partial_image, image_generation.completed
//
// Controls are named as the interface names its fields: a request is the form read out, and an error's `param` finds its control.
// All that the server says is set as text, never as markup. Addresses are relative: the page also works under a prefix, behind a proxy.

const POLL_MS = 2000;
const STATUS_TIMEOUT_MS = 6000; // a stopped process accepts connections and never answers
const FEW_CLASSES = 30; // more are searched rather than scrolled through
const SMALL_PX = 256; // narrower pictures are enlarged pixel by pixel
const LARGE_PX = 384; // wider ones get more room
const MOST_PICTURES = 100; // they are held in memory; the oldest go
const KEY = "dite-api-key";
const NOTICES = {
  starting: "The model is loading. You can draw as soon as it is ready.",
  restarting: "A rank was lost and the ranks are starting again. Requests wait meanwhile.",
  draining: "The server is stopping and takes no more requests.",
  failed: "The ranks failed too often and the server gave up. Its log says why.",
  gone: "The server doesn't answer. Trying again every 2 seconds.",
};

const byId = (id) => document.getElementById(id);
const form = byId("settings");
const control = (name) => form.querySelector(`[name="${CSS.escape(name)}"]:enabled`);
const page = {
  status: null, // the server's last word
  pollTimer: 0,
  apiKey: null,
  locked: false, // waiting for a key: nothing is asked meanwhile
  card: null, // of the model that the form was built for
  offered: "", // all that it was built from, as text
  classes: new Map(), // name → id
  drawing: null, // AbortController of the request under way
  results: [], // newest first
  shown: null,
};

/** A new element; strings among the children become text. */
function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Fill a <dl> from an object; what is null is left out. */
function list(id, facts) {
  const known = Object.entries(facts).filter(([, value]) => value !== null);
  byId(id).replaceChildren(...known.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, `${value}`))));
}

/** Alerts and live regions are read out whenever they are set, changed or not. */
function say(id, text) {
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

function seconds(s) {
  const [value, unit] = s < 0.9995 ? [s * 1000, "ms"] : s < 120 ? [s, "s"] : s < 7200 ? [s / 60, "min"] : [s / 3600, "h"];
  return `${Number(value.toPrecision(3))} ${unit}`;
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// ---- Talking with the server
class Problem extends Error {
  constructor(message, facts = {}) {
    Object.assign(super(message), { status: 0, param: null, retry_s: 0 }, facts);
  }
}

/** A good response, or a Problem. */
async function call(path, options) {
  const headers = { ...options.headers, ...(page.apiKey && { Authorization: `Bearer ${page.apiKey}` }) };
  const response = await fetch(path, { ...options, headers }).catch(() => {
    throw new Problem("The server doesn't answer.");
  });
  if (response.ok) return response;
  const error = (await response.json().catch(() => null))?.error;
  const retry_s = Number(response.headers.get("retry-after"));
  throw new Problem(String(error?.message ?? `The server answered ${response.status}.`), { status: response.status, param: error?.param, retry_s });
}

/** Server-sent events as their parsed `data`. EventSource can't be used: it neither posts nor sends a key. */
export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(() => {
      throw new Problem("The connection to the server was lost.");
    });
    if (done) return;
    rest += value;
    if (!value.includes("\n")) continue; // a picture comes in many pieces: look once, not once a piece
    const blocks = rest.replaceAll("\r\n", "\n").split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data:"));
      if (data.length) yield JSON.parse(data.map((line) => line.slice(5)).join("\n")); // without data it is a comment that keeps the line open
    }
  }
}

// ---- Status
async function poll() {
  if (page.locked) return;
  try {
    const response = await call("v1/status", { cache: "no-store", signal: AbortSignal.timeout(STATUS_TIMEOUT_MS) });
    showStatus(await response.json());
  } catch (error) {
    if (error.status === 401) askForKey();
    else showState("gone", error.status ? error.message : NOTICES.gone);
  }
  clearTimeout(page.pollTimer); // another poll may have begun when the tab came back
  if (!document.hidden) page.pollTimer = setTimeout(poll, POLL_MS);
}

function showState(state, notice, load = "") {
  const light = byId("state");
  if (state === "ready" && !["connecting", "ready"].includes(light.dataset.state)) say("announcer", "The server is ready.");
  light.dataset.state = state;
  light.textContent = state === "gone" ? "no answer" : state;
  byId("load").textContent = load;
  say("notice", notice);
}

function showStatus(status) {
  const { state, model, queue, running, ranks, card } = status;
  Object.assign(page, { status, locked: false });
  showState(state, NOTICES[state] ?? "", `${running} running, ${queue.depth} waiting`);
  byId("model").textContent = model;
  list("tiles", {
    running,
    waiting: queue.depth,
    "work ahead": queue.cost_s ? seconds(queue.cost_s) : "none",
    "ranks alive": ranks.length ? `${ranks.filter((rank) => rank.alive).length} of ${ranks.length}` : "none",
    "a step": status.seconds_per_step === null ? "–" : seconds(status.seconds_per_step),
    "pictures drawn": status.images,
    restarts: status.restarts,
    up: seconds(status.uptime_s),
  });
  const memory = ({ memory_bytes }) => (memory_bytes ? `, ${Math.round(memory_bytes / 2 ** 20)} MiB` : ""); // unknown before its first heartbeat
  list("ranks", Object.fromEntries(ranks.map((one) => [`rank ${one.rank}`, one.alive ? `process ${one.pid}${memory(one)}` : "not running"])));
  if (page.drawing && byId("bar").position < 0) byId("bar-text").textContent = waitingText();
  if (!page.drawing) document.title = `${model} · dite`;
  if (card) offer(status);
  byId("server").hidden = false;
  byId("workbench").hidden = !page.card;
  if (byId("key-form").contains(document.activeElement)) byId("draw").focus();
  byId("key-form").hidden = true;
}

function askForKey() {
  byId("key-refused").textContent = page.apiKey ? "The server refused this key." : "";
  Object.assign(page, { apiKey: null, locked: true });
  showState("locked", "");
  byId("workbench").hidden = byId("server").hidden = true;
  byId("key-form").hidden = false;
  byId("key").value = "";
  byId("key").focus();
}

// ---- The form
/** Fit the form to the model: once, unless another is served later. */
function offer({ model, card, defaults, limits }) {
  const offered = JSON.stringify([model, card, defaults, limits]);
  if (offered === page.offered) return;
  Object.assign(page, { offered, card, classes: new Map(Object.entries(card.classes)) });
  const size = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(card.parameters);
  const about = [`${size} parameters`, card.pipeline, card.backend];
  if (card.exchange) about.push(`${plural(card.exchange.ranks, "rank")}, ${card.exchange.mode}, ${card.exchange.codec}`);
  byId("card").textContent = about.filter(Boolean).join(" · ");

  // A class of several names is offered by its first.
  const firstNames = new Map([...page.classes].reverse().map(([name, id]) => [id, name]));
  const names = card.class_ids.map((id) => firstNames.get(id) ?? `class:${id}`);
  const few = names.length <= FEW_CLASSES;
  byId(few ? "class" : "class-names").replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  byId("class-name").value = names[0] ?? "";
  byId("class-hint").textContent = `One of ${names.length}: type part of a name, or a number.`;
  use("class-list", !card.reads_text && few);
  use("class-search", !card.reads_text && !few);
  use("text-fields", card.reads_text);
  use("negative-field", card.takes_negative_prompt);
  use("size-fields", !card.fixed_size);
  use("guidance-field", card.takes_guidance);
  const { prompt, negative_prompt, n, num_inference_steps, guidance_scale, width, height } = form.elements;
  prompt.maxLength = negative_prompt.maxLength = limits.prompt_chars;
  n.max = limits.images;
  num_inference_steps.max = Math.min(card.most_steps, limits.steps);
  num_inference_steps.value = Math.min(defaults.steps, num_inference_steps.max);
  guidance_scale.value = defaults.guidance;
  for (const side of [width, height]) Object.assign(side, { min: card.multiple_px, step: card.multiple_px });
  [width.value, height.value] = card.default_size_px;
}

/** Show a fieldset, or hide it and leave what it holds out of the request. */
const use = (id, wanted) => (byId(id).hidden = byId(id).disabled = !wanted);

/** The body of a request. A class is sent by its id; words that name none go as they are, and the server answers what is near. */
function requestOf(fields) {
  const request = { model: page.status.model, stream: true, progress: true, partial_images: 2, output_format: "png" };
  for (const name of ["n", "num_inference_steps", "guidance_scale", "seed"]) if (name in fields) request[name] = Number(fields[name]);
  for (const name of ["prompt", "negative_prompt"]) if (fields[name]) request[name] = fields[name];
  if ("class_labels" in fields) request.class_labels = page.classes.get(fields.class_labels) ?? fields.class_labels.trim();
  if ("width" in fields) request.size = `${fields.width}x${fields.height}`;
  return request;
}

function fixSeed(seed) {
  byId("random").checked = byId("seed").disabled = false;
  byId("seed").value = seed;
  say("announcer", `The seed is now ${seed}.`);
}

// ---- Drawing
async function draw(fields) {
  if (page.drawing) return;
  page.drawing = new AbortController();
  const request = requestOf(fields);
  const [width, height] = "width" in fields ? [fields.width, fields.height] : page.card.default_size_px;
  const frames = Array.from({ length: request.n }, () => element("div", { className: `frame ${scaling(width)}` }));
  for (const frame of frames) frame.style.aspectRatio = `${width} / ${height}`;
  lay(frames.map((frame) => element("figure", {}, frame)), width);
  showBusy(true);
  showProblem(null);
  try {
    const posted = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal: page.drawing.signal };
    const response = await call("v1/images/generations", posted);
    keep({ fields, label: fields.prompt ?? fields.class_labels, ...(await follow(readEvents(response.body), frames)) });
  } catch (error) {
    if (page.drawing.signal.aborted) say("announcer", "Cancelled.");
    else if (error.status === 401) askForKey();
    else showProblem(error);
  }
  page.drawing.abort(); // after an error something may still be on its way
  page.drawing = null;
  showBusy(false);
  show(page.shown);
}

/** Show what comes while it is drawn, and return the finished pictures and the facts about them. */
async function follow(events, frames) {
  const pictures = [];
  let facts = null;
  let first = null;
  for await (const event of events) {
    if (event.error) throw new Problem(String(event.error.message), { param: event.error.param });
    if (event.type === "dite.progress") {
      if (!first || event.step < first.step) first = { step: event.step, ms: performance.now() }; // a drawing whose ranks died begins anew
      showStep(event, ((performance.now() - first.ms) / 1000 / (event.step - first.step)) * (event.steps - event.step));
    } else if (event.type === "image_generation.partial_image") {
      const image = element("img", { alt: "", src: URL.createObjectURL(blobOf(event)), onload: () => URL.revokeObjectURL(image.src) });
      frames[event.dite.picture].replaceChildren(image);
    } else if (event.type === "image_generation.completed") {
      facts = event.dite;
      pictures.push({ url: URL.createObjectURL(blobOf(event)), seed: facts.seeds[facts.picture] });
    }
  }
  if (pictures.length < frames.length) throw new Problem("The connection ended before the pictures were complete.");
  return { pictures, facts };
}

function showBusy(busy) {
  const [from, to] = busy ? [["draw", "again"], "cancel"] : [["cancel"], "draw"];
  byId(to).disabled = false;
  if (from.includes(document.activeElement.id)) byId(to).focus(); // a control that is disabled or hidden would drop the keyboard's focus
  for (const id of from) byId(id).disabled = true;
  byId("again").disabled = byId("result").hidden = busy;
  byId("progress").hidden = !busy;
  if (!busy) return;
  byId("bar").removeAttribute("value");
  byId("bar-text").textContent = waitingText();
  say("announcer", "Waiting.");
  byId("stage").scrollIntoView({ block: "nearest" });
}

const waitingText = () => `Waiting for its turn${page.status.queue.depth ? `, ${page.status.queue.depth} in the queue` : ""}`;

function showStep({ step, steps }, left_s) {
  const text = `Step ${step} of ${steps}`;
  // Who listens hears quarters: every step would drown all else.
  if (Math.floor((4 * step) / steps) > Math.floor((4 * (step - 1)) / steps)) say("announcer", text);
  Object.assign(byId("bar"), { max: steps, value: step });
  byId("bar-text").textContent = left_s > 1 && left_s < Infinity ? `${text}, about ${seconds(Math.ceil(left_s))} left` : text;
  document.title = `${step}/${steps} · ${page.status.model} · dite`;
}

function blobOf({ b64_json, output_format }) {
  return new Blob([Uint8Array.from(atob(b64_json), (letter) => letter.charCodeAt(0))], { type: `image/${output_format}` });
}

/** Say what went wrong and lead to the control at fault; null when nothing is wrong any more. */
function showProblem(problem) {
  byId("problem").textContent = problem?.message ?? "";
  if (!problem) return;
  const at = new Date(Date.now() + problem.retry_s * 1000).toLocaleTimeString();
  if (problem.retry_s) byId("problem").textContent += `\nTry again in ${plural(problem.retry_s, "second")}, at ${at}.`;
  control(problem.param === "size" ? "width" : problem.param)?.focus();
}

// ---- Results
function keep(result) {
  page.shown = result;
  page.results.unshift(result);
  byId("results").prepend(historyEntry(result));
  while (page.results.length > 1 && page.results.flatMap((one) => one.pictures).length > MOST_PICTURES) {
    for (const picture of page.results.pop().pictures) URL.revokeObjectURL(picture.url);
    byId("results").lastChild.remove();
  }
  const { seed, timings } = result.facts;
  say("announcer", `${plural(result.pictures.length, "picture")} drawn in ${seconds(timings.total_s)}, seed ${seed}.`);
}

const scaling = (width) => (width < SMALL_PX ? "pixels" : "");

/** Put figures on the stage, for pictures so wide; 0: none are. */
function lay(figures, width) {
  byId("pictures").className = `${width && figures.length === 1 ? "alone" : ""} ${width > LARGE_PX ? "large" : ""}`;
  byId("pictures").replaceChildren(...figures);
}

/** Show a result, or an empty stage, and mark it in the history. */
function show(result) {
  page.shown = result;
  byId("result").hidden = !result;
  byId("history").hidden = page.results.length < 2;
  page.results.forEach((one, at) => byId("results").children[at].firstChild.setAttribute("aria-current", one === result));
  if (!result) return lay([element("p", { className: "empty" }, "Pictures will appear here.")], 0);
  const { size, steps, guidance, timings } = result.facts;
  const attempts = result.facts.attempts > 1 ? `${result.facts.attempts}, ranks were lost` : null;
  const [queue, run, total] = [timings.queue_s, timings.run_s, timings.total_s].map(seconds);
  lay(result.pictures.map((picture) => figureOf(result, picture)), parseInt(size));
  byId("label").textContent = result.label;
  list("facts", { steps, guidance, size: size.replace("x", " × "), queue, run, total, attempts });
}

function figureOf({ label, facts }, { url, seed }) {
  const words = label.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40);
  const link = element("a", { href: url, download: `${words}-seed-${seed}.png`, title: "Download as PNG" });
  link.className = `frame ${scaling(parseInt(facts.size))}`;
  link.append(element("img", { src: url, alt: `${label}, seed ${seed}` }));
  const button = element("button", { type: "button", className: "link", onclick: () => fixSeed(seed) }, "Use this seed");
  return element("figure", {}, link, element("figcaption", {}, element("span", {}, `seed ${seed}`), button));
}

function historyEntry(result) {
  const { fields, pictures, label, facts } = result;
  const line = `${pictures.length > 1 ? `${pictures.length} from ` : ""}seed ${facts.seed}, ${plural(facts.steps, "step")}`;
  const button = element("button", { type: "button", title: label, className: scaling(parseInt(facts.size)) });
  button.append(element("img", { src: pictures[0].url, alt: "" }), element("b", {}, label), element("span", {}, line));
  button.onclick = () => {
    fixSeed(facts.seed); // enables the field, too
    for (const [name, value] of Object.entries(fields)) if (control(name)) control(name).value = value;
    if (page.drawing) return; // its frames have the stage
    show(result);
    byId("stage").scrollIntoView({ block: "nearest" });
  };
  return element("li", {}, button);
}

// ---- What a person does
form.onsubmit = (event) => {
  event.preventDefault();
  draw(Object.fromEntries(new FormData(form)));
};
byId("cancel").onclick = () => page.drawing?.abort();
byId("again").onclick = () => draw(page.shown.fields);
byId("class-name").onfocus = () => byId("class-name").select(); // the list offers what begins as the field does: typing replaces it all
byId("random").onchange = () => {
  byId("seed").disabled = byId("random").checked;
  byId("seed").focus();
};
byId("prompt").onkeydown = ({ key, ctrlKey, metaKey }) => key === "Enter" && (ctrlKey || metaKey) && form.requestSubmit();
byId("key-form").onsubmit = (event) => {
  event.preventDefault();
  Object.assign(page, { apiKey: byId("key").value, locked: false });
  try { sessionStorage.setItem(KEY, page.apiKey); } catch { /* storage may be forbidden: the key then lives as long as the page */ }
  poll();
};
document.addEventListener("visibilitychange", () => document.hidden || poll());

try { page.apiKey = sessionStorage.getItem(KEY); } catch { /* as above */ }
poll();
