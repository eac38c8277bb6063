"use strict";
/*
 * The page of `codellama serve`: four ways to look at one model. It talks to the server's OpenAI endpoints and to
 * /tokenize, /props and /health, and to nothing else. Text from a model reaches the document as text nodes only.
 *
 * In reading order: what is remembered, the server, one request at a time, the parts every tab shares, Complete,
 * Infill, Chat, Tokens, settings, start.
 */

// --- what is remembered: localStorage for text and settings, sessionStorage for the key ------------------------------

const STORE = "codellama.page";
const SAMPLING = { model: "", temperature: 0.2, top_p: 0.95, max_tokens: 256, seed: "", stop: "" };
const NOTHING = {
  theme: "auto",
  tab: "complete",
  scope: "block",
  typing: true,
  count: 24,
  settings: SAMPLING,
  drafts: { complete: "", infill: "", chat: "", tokens: "" },
  chat: { system: "", messages: [], used: 0 },
};
const state = recall();
let saving = 0;

/** What was stored, laid over the defaults. Whatever has another type than its default is ignored. */
function recall() {
  const kept = structuredClone(NOTHING);
  let stored = null;
  try {
    stored = JSON.parse(localStorage.getItem(STORE));
  } catch { /* storage is forbidden, or holds no JSON: start with the defaults */ }
  overlay(kept, stored);
  kept.chat.messages = kept.chat.messages.filter((m) => typeof m?.content === "string" && typeof m.role === "string");
  return kept;
}

function overlay(target, source) {
  for (const [key, value] of Object.entries(target)) {
    const given = source?.[key];
    if (Array.isArray(value)) target[key] = Array.isArray(given) ? given : value;
    else if (typeof value === "object") overlay(value, given);
    else if (typeof given === typeof value) target[key] = given;
  }
}

function save() {
  clearTimeout(saving);
  saving = setTimeout(saveNow, 300);
}

function saveNow() {
  clearTimeout(saving);
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch { /* full or forbidden: the page works without it */ }
}

function apiKey() {
  try {
    return sessionStorage.getItem(STORE) ?? "";
  } catch {
    return "";
  }
}

function authorization() {
  return apiKey() ? { Authorization: `Bearer ${apiKey()}` } : {};
}

document.documentElement.dataset.theme = state.theme; // before the body is drawn

// --- the server ------------------------------------------------------------------------------------------------------

const server = { models: [], path: "", context: 0, state: "wait" };
const NUMBER = new Intl.NumberFormat("en");

/** An error in words for the person at the page. kind: "gone", "key", "busy", "refused", "failed" or "broken". */
class Trouble extends Error {
  constructor(kind, words) {
    super(words);
    this.kind = kind;
  }
}

/** POSTs. An answer other than 2xx, or none, is thrown as a Trouble. Paths are relative: a proxy may add a prefix. */
async function ask(path, body, signal) {
  const headers = { ...authorization(), "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (signal?.aborted) throw error;
    connect();
    throw new Trouble("gone", "The server does not answer. It may have stopped, or the network is down.");
  }
  if (server.state === "gone") connect();
  if (!response.ok) throw await trouble(response);
  return response;
}

async function trouble(response) {
  const said = message(await response.json().catch(() => null));
  const because = said ? `: ${said}` : ".";
  const wait = response.headers.get("Retry-After") ?? "";
  switch (response.status) {
    case 401:
    case 403:
      return new Trouble("key", `The server ${apiKey() ? "does not accept this" : "asks for an"} API key.`);
    case 429: {
      const when = /^\d+$/.test(wait) ? ` It asks to wait ${wait} second${wait === "1" ? "" : "s"}.` : "";
      return new Trouble("busy", `The server is busy: its queue is full.${when}`);
    }
    case 503:
      return new Trouble("busy", `The server is not ready${because}`);
    case 413:
      return new Trouble("refused", "The text is larger than the server accepts.");
  }
  if (response.status >= 500) return new Trouble("failed", `The server failed (${response.status})${because}`);
  return new Trouble("refused", `The server refused the request${because}`);
}

/** The sentence in an error body, in OpenAI's, FastAPI's or TGI's shape. */
function message(body) {
  const error = body?.error ?? body?.detail ?? body?.message;
  if (typeof error === "string") return error;
  if (Array.isArray(error)) return error.map((one) => one?.msg).filter(Boolean).join("; ");
  return typeof error?.message === "string" ? error.message : "";
}

/** The objects of a server-sent event stream, until [DONE]. */
async function* stream(path, body, signal) {
  const stream_options = { include_usage: true, continuous_usage_stats: true };
  const response = await ask(path, { ...body, stream: true, stream_options }, signal);
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (signal.aborted) throw error;
        return { done: true };
      });
      if (done) throw new Trouble("broken", "The connection broke off before the answer was complete.");
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new Trouble("failed", `The server failed: ${message(event) || "it gave no reason."}`);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What the settings say, in the API's words. */
function sampling() {
  const { temperature, top_p, max_tokens, seed, stop } = state.settings;
  const body = { model: model(), temperature, top_p, max_tokens, return_token_ids: true };
  if (seed !== "") body.seed = Number(seed);
  const stops = stop.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n").replaceAll("\\t", "\t"));
  if (stops.length) body.stop = stops;
  return body;
}

function model() {
  const chosen = state.settings.model;
  return server.models.includes(chosen) ? chosen : server.models[0] ?? "codellama";
}

/** Pieces of a completion. Without a suffix the model continues; with one it infills. */
async function* complete(prompt, suffix, signal, pace, more = {}) {
  const body = { ...sampling(), prompt, ...more };
  if (suffix) body.suffix = suffix;
  pace.next();
  for await (const event of stream("v1/completions", body, signal)) {
    pace.see(event);
    const choice = event.choices?.[0];
    if (choice) yield choice;
  }
}

/** Asks who is there, and shows it in the header. While nobody answers, asks again every three seconds. */
async function connect() {
  clearTimeout(connect.again);
  const turn = (connect.turn = (connect.turn ?? 0) + 1);
  let found = { state: "gone", words: "No server" };
  try {
    const health = await fetch("health");
    if (!health.ok) found = { state: "wait", words: "Not ready" };
    else found = await introduce();
  } catch { /* no answer: shown as such */ }
  if (turn !== connect.turn) return;
  server.state = found.state;
  $("connection").dataset.state = found.state;
  $("connection-text").textContent = found.words;
  drawFacts();
  drawContext();
  if (found.state === "gone" || found.state === "wait") connect.again = setTimeout(connect, 3000);
}

async function introduce() {
  const headers = authorization();
  const [models, props] = await Promise.all([fetch("v1/models", { headers }), fetch("props", { headers })]);
  if (models.status === 401 || models.status === 403) return { state: "key", words: "API key needed" };
  if (models.ok) server.models = ((await models.json()).data ?? []).map((one) => String(one.id));
  if (props.ok) {
    const known = await props.json();
    server.context = Number(known.default_generation_settings?.n_ctx) || 0;
    server.path = String(known.model_path ?? "");
  }
  return { state: "ready", words: model() };
}

// --- one request at a time -------------------------------------------------------------------------------------------

/** Counts tokens while they come; the server's own count replaces ours where it sends one. */
class Pace {
  constructor() {
    this.start = performance.now();
    this.earlier = { tokens: 0, steps: 0, seconds: 0 };
    this.written = this.head = this.first = this.last = this.used = 0;
  }

  /** A job may make several requests, one after the other. */
  next() {
    this.earlier = { tokens: this.tokens, steps: this.steps, seconds: this.seconds };
    this.written = this.head = this.first = this.last = 0;
  }

  get tokens() {
    return this.earlier.tokens + this.written;
  }

  /** Tokens after a request's first chunk: what the seconds between the first chunk and the last were spent on. */
  get steps() {
    return this.earlier.steps + Math.max(0, this.written - this.head);
  }

  get seconds() {
    return this.earlier.seconds + (this.last - this.first) / 1000;
  }

  see(event) {
    const choice = event.choices?.[0];
    const count = choice?.token_ids?.length || (choice?.text || choice?.delta?.content ? 1 : 0);
    if (count) {
      this.last = performance.now();
      this.first ||= this.last;
      this.head ||= count;
      this.written += count;
    }
    if (event.usage) {
      this.written = event.usage.completion_tokens ?? this.written;
      this.used = event.usage.total_tokens ?? 0;
    }
  }

  words() {
    const said = [`${NUMBER.format(this.tokens)} token${this.tokens === 1 ? "" : "s"}`];
    const rate = this.steps / this.seconds;
    if (rate && Number.isFinite(rate)) said.push(`${NUMBER.format(Number(rate.toPrecision(3)))} tokens/s`);
    return said.join(" · ");
  }

  /** The same, and how much of the context the request took. */
  wordsWithContext() {
    if (!this.used) return this.words();
    const of = server.context ? ` of ${NUMBER.format(server.context)}` : "";
    return `${this.words()} · context ${NUMBER.format(this.used)}${of}`;
  }
}

/** The running request of a tab. Its button turns into Stop, which aborts it. An error is shown with a way to retry. */
class Job {
  /** @param {string} tab  @param {() => void} start what the button does while nothing runs */
  constructor(tab, start) {
    this.panel = $(tab);
    this.button = this.panel.querySelector(".run");
    this.label = this.button.textContent;
    this.status = this.panel.querySelector(".status");
    this.box = this.panel.querySelector(".trouble");
    this.start = start;
    this.control = null;
    this.button.addEventListener("click", (event) => {
      event.preventDefault();
      if (this.control) this.stop();
      else this.start();
    });
  }

  get running() {
    return this.control !== null;
  }

  stop() {
    this.control?.abort();
  }

  /**
   * Runs work(signal, pace), which returns the words to show at its end, or nothing for the usual ones.
   * @returns {Promise<"done" | "stopped" | "failed">}
   */
  async run(work, retry = this.start) {
    this.stop();
    const control = (this.control = new AbortController());
    const mine = () => this.control === control;
    const pace = new Pace();
    const ticking = setInterval(() => mine() && this.tick(pace), 200);
    this.forgive();
    this.say("");
    this.button.textContent = "Stop";
    this.panel.setAttribute("aria-busy", "true");
    let end = "done";
    try {
      const words = await work(control.signal, pace);
      if (mine()) this.say(words ?? pace.wordsWithContext());
    } catch (error) {
      end = control.signal.aborted ? "stopped" : "failed";
      if (mine()) this.say(end === "stopped" ? pace.tokens ? `Stopped · ${pace.words()}` : "Stopped" : "");
      if (mine() && end === "failed") this.complain(error, retry);
    } finally {
      clearInterval(ticking);
      control.abort(); // work may have left early with enough text: the server need not go on
      if (mine()) {
        this.control = null;
        this.button.textContent = this.label;
        this.panel.removeAttribute("aria-busy");
      }
    }
    return end;
  }

  tick(pace) {
    const seconds = Math.floor((performance.now() - pace.start) / 1000);
    if (pace.tokens) this.say(pace.words());
    else if (seconds > 0) this.say(`Waiting for the first token · ${seconds} s`);
  }

  say(words) {
    if (this.status.textContent !== words) this.status.textContent = words;
  }

  forgive() {
    this.box.replaceChildren();
  }

  complain(error, retry) {
    const words = error instanceof Trouble ? error.message : `The page failed: ${error.message}`;
    const again = button("Try again", () => { this.forgive(); retry(); });
    const buttons = [again, button("Close", () => this.forgive(), "plain")];
    if (error.kind === "key") buttons.unshift(button("Enter the key", () => openSettings("set-key")));
    this.box.replaceChildren(element("p", "", words), ...buttons);
  }
}

// --- the parts every tab shares --------------------------------------------------------------------------------------

/** @returns {HTMLElement} */
function $(id) {
  return document.getElementById(id);
}

/** A new element with text in it. The only way text of any source enters the document. */
function element(name, className = "", text = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function button(label, onClick, className = "") {
  const made = element("button", className, label);
  made.type = "button";
  made.addEventListener("click", onClick);
  return made;
}

function announce(words) {
  $("announce").textContent = words;
}

/** Types text at the cursor, or over the selection, so that Undo takes it back. */
function type(area, text) {
  area.focus();
  if (document.execCommand?.("insertText", false, text)) return;
  area.setRangeText(text, area.selectionStart, area.selectionEnd, "end");
  area.dispatchEvent(new Event("input", { bubbles: true }));
}

function replaceText(area, text, cursor = text.length) {
  area.focus();
  area.select();
  type(area, text);
  area.setSelectionRange(cursor, cursor);
}

async function copy(text, clicked) {
  const label = clicked.textContent;
  clicked.textContent = (await toClipboard(text)) ? "Copied" : "Not copied";
  announce(clicked.textContent);
  setTimeout(() => { clicked.textContent = label; }, 1500);
}

/** The clipboard API exists on https and localhost only; elsewhere the old command does. */
async function toClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const back = document.activeElement;
    const area = element("textarea", "quiet");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    back?.focus();
    return done;
  }
}

/** Grows a textarea with its text, up to the limit of its style sheet. */
function grow(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

/** Keeps a field in state.drafts. */
function keepDraft(area, name) {
  area.value = state.drafts[name];
  area.addEventListener("input", () => {
    state.drafts[name] = area.value;
    save();
  });
}

/** Ctrl+Enter or ⌘+Enter runs, Esc stops: the same in each tab with a text. */
function runKeys(area, job) {
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      job.start();
    }
  });
  job.panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && job.running) {
      event.preventDefault();
      job.stop();
    }
  });
}

const MARK = "<FILL_ME>";
const CURSOR = "‸"; // where an example puts the cursor
const EXAMPLES = {
  complete: {
    Continue: `def fibonacci(n: int) -> int:
    """The n-th Fibonacci number."""
${CURSOR}`,
    "In the middle": `def mean(values: list[float]) -> float:
    total = ${CURSOR}
    return total / len(values)
`,
  },
  infill: {
    Docstring: `def remove_non_ascii(s: str) -> str:
    """ ${MARK}
    return "".join(c for c in s if ord(c) < 128)
`,
    "Two marks": `def clamp(value: float, low: float, high: float) -> float:
    if value < low:
        return ${MARK}
    if value > high:
        return ${MARK}
    return value
`,
  },
  chat: {
    "Write a function": "Write a Python function that tells whether a string is a palindrome. Ignore case and spaces.",
    "Explain code": `What does this do?

\`\`\`python
def f(xs):
    return [x for i, x in enumerate(xs) if x not in xs[:i]]
\`\`\``,
    "Find the bug": `Find the bug:

\`\`\`python
def average(xs):
    return sum(xs) / len(xs - 1)
\`\`\``,
  },
  tokens: {
    Function: "def is_even(n: int) -> bool:\n    return n %",
    Loop: "for i in range(10):\n    print(",
  },
};

function drawExamples() {
  for (const place of document.querySelectorAll("[data-examples]")) {
    const tab = place.dataset.examples;
    for (const [name, text] of Object.entries(EXAMPLES[tab])) {
      place.append(button(name, () => useExample(tab, text), "chip"));
    }
  }
}

function useExample(tab, text) {
  const area = $(tab === "chat" ? "chat-input" : `${tab}-text`);
  const cursor = text.indexOf(CURSOR);
  replaceText(area, text.replace(CURSOR, ""), cursor < 0 ? text.length : cursor);
}

// --- Complete: an editor whose continuation is ghost text ------------------------------------------------------------

/** What a suggestion may be: one line, the text up to a blank line, or all. */
const SCOPES = { line: /^\s*\S[^\n]*(?=\n)/, block: /^\s*\S[^]*?(?=\n[ \t]*\n)/, all: /^$/ };

class Completer {
  constructor() {
    this.area = $("complete-text");
    /** What was asked for: text before and after the cursor, and the model's text so far. */
    this.offer = null;
    this.timer = 0;
    this.job = new Job("complete", () => this.suggest());
    keepDraft(this.area, "complete");
    runKeys(this.area, this.job);
    this.area.addEventListener("input", () => this.typed());
    this.area.addEventListener("keydown", (event) => this.key(event));
    document.addEventListener("selectionchange", () => {
      if (document.activeElement === this.area) this.check();
    });
    $("complete-accept").addEventListener("click", () => this.accept());
    $("complete-dismiss").addEventListener("click", () => { this.dismiss(); this.area.focus(); });
    $("complete-scope").value = state.scope;
    $("complete-scope").addEventListener("change", (event) => { state.scope = event.target.value; save(); });
    $("complete-typing").checked = state.typing;
    $("complete-typing").addEventListener("change", (event) => { state.typing = event.target.checked; save(); });
    this.draw();
  }

  /** The part of the offer that is not yet typed, or null where text or cursor have left it. */
  get ghost() {
    if (!this.offer) return null;
    const { value, selectionStart: at, selectionEnd: end } = this.area;
    const { head, tail, text } = this.offer;
    if (at !== end || at < head.length || !value.startsWith(head) || value.slice(at) !== tail) return null;
    const already = value.slice(head.length, at);
    return text.startsWith(already) ? text.slice(already.length) : null;
  }

  typed() {
    this.check();
    clearTimeout(this.timer);
    if (state.typing && !this.offer) this.timer = setTimeout(() => this.suggest(), 500);
  }

  check() {
    if (this.offer && this.ghost === null) this.dismiss();
    else this.draw();
  }

  async suggest() {
    clearTimeout(this.timer);
    const { value, selectionEnd: at } = this.area;
    const head = value.slice(0, at);
    const tail = value.slice(at);
    if (!value.trim()) return this.job.say("Write some code first.");
    const offer = (this.offer = { head, tail, text: "" });
    this.draw();
    const end = await this.job.run((signal, pace) => this.receive(offer, signal, pace));
    if (this.offer !== offer) return;
    if (end === "failed" || !offer.text) this.offer = null;
    this.draw();
    if (this.offer) announce(`Suggestion: ${offer.text}. Tab accepts, Escape dismisses.`);
  }

  async receive(offer, signal, pace) {
    const suffix = offer.tail.trim() ? offer.tail : "";
    for await (const choice of complete(offer.head, suffix, signal, pace)) {
      offer.text += choice.text ?? "";
      const enough = SCOPES[state.scope]?.exec(offer.text);
      if (enough?.[0]) offer.text = enough[0];
      if (this.offer === offer) this.draw();
      if (enough?.[0]) break;
    }
    if (!offer.text) return "The model has nothing to add here.";
    const job = offer.text && suffix ? "Infilled" : "Continued";
    return `${job} · ${pace.wordsWithContext()}`;
  }

  key(event) {
    if (event.isComposing) return;
    const plain = !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey;
    if (event.key === "Tab" && plain && this.ghost) {
      event.preventDefault();
      this.accept();
    } else if (event.key === "Escape" && this.offer) {
      event.preventDefault();
      event.stopPropagation();
      this.dismiss();
    } else if (event.key === "ArrowRight" && (event.ctrlKey || event.altKey) && this.ghost) {
      event.preventDefault();
      type(this.area, /^\s*\w+|^\s*[^\w\s]+|^\s+/.exec(this.ghost)[0]);
    } else if (event.key === "Enter" && plain) {
      this.indent(event);
    }
  }

  /** A new line begins as far in as the one before it, and further after a colon. */
  indent(event) {
    const line = this.area.value.slice(0, this.area.selectionStart).split("\n").pop();
    const space = /^[ \t]*/.exec(line)[0] + (line.trimEnd().endsWith(":") ? "    " : "");
    if (!space) return;
    event.preventDefault();
    type(this.area, `\n${space}`);
  }

  accept() {
    const ghost = this.ghost;
    if (!ghost) return;
    this.job.stop();
    this.offer = null;
    const at = this.area.selectionStart;
    this.area.focus();
    this.area.setSelectionRange(at, at);
    type(this.area, ghost);
    announce("Accepted");
  }

  dismiss() {
    clearTimeout(this.timer);
    this.job.stop();
    this.offer = null;
    this.draw();
  }

  /** The mirror lies under the textarea, whose own letters are transparent, and shows its text with the ghost in it. */
  draw() {
    const { value, selectionStart: at } = this.area;
    const ghost = this.ghost ?? "";
    const shown = element("span", "ghost", ghost);
    const after = `${value.slice(ghost ? at : value.length)} `; // the last line has height, even an empty one
    $("complete-mirror").replaceChildren(ghost ? value.slice(0, at) : value, shown, after);
    $("complete-accept").disabled = $("complete-dismiss").disabled = !ghost;
    if (ghost) this.reveal(shown);
  }

  /** Scrolls to the end of the ghost, as long as its beginning stays in view. */
  reveal(shown) {
    const editor = $("complete-editor");
    const below = shown.offsetTop + shown.offsetHeight + 12 - editor.scrollTop - editor.clientHeight;
    if (below > 0) editor.scrollTop = Math.min(editor.scrollTop + below, shown.offsetTop - 12);
  }
}

// --- Infill: <FILL_ME> -----------------------------------------------------------------------------------------------

class Infiller {
  constructor() {
    this.area = $("infill-text");
    this.result = "";
    this.job = new Job("infill", () => this.fill());
    keepDraft(this.area, "infill");
    runKeys(this.area, this.job);
    $("infill-mark").addEventListener("click", () => type(this.area, MARK));
    $("infill-copy").addEventListener("click", (event) => copy(this.result, event.target));
    $("infill-use").addEventListener("click", () => replaceText(this.area, this.result));
    this.draw([], []);
  }

  async fill() {
    const parts = this.area.value.split(MARK);
    if (parts.length === 1) return this.job.say(`Put ${MARK} where code is missing.`);
    const fills = [];
    this.draw(parts, fills);
    const end = await this.job.run((signal, pace) => this.receive(parts, fills, signal, pace));
    if (end === "done") announce("Filled");
  }

  /** One mark after the other: a mark's prefix has the fills before it, its suffix has the later marks taken out. */
  async receive(parts, fills, signal, pace) {
    for (let i = 0; i + 1 < parts.length; i += 1) {
      const prefix = parts.slice(0, i + 1).map((part, k) => part + (fills[k] ?? "")).join("");
      fills[i] = "";
      for await (const choice of complete(prefix, parts.slice(i + 1).join(""), signal, pace)) {
        fills[i] += choice.text ?? "";
        this.draw(parts, fills);
      }
    }
  }

  draw(parts, fills) {
    const nodes = [];
    parts.forEach((part, i) => {
      nodes.push(part);
      if (i + 1 === parts.length) return;
      nodes.push(i < fills.length ? element("ins", "fill", fills[i]) : element("span", "hole", MARK));
    });
    if (!nodes.length) nodes.push(element("span", "faint", "The filled text appears here."));
    $("infill-result").replaceChildren(...nodes);
    this.result = parts.map((part, i) => part + (i + 1 < parts.length ? fills[i] ?? MARK : "")).join("");
    $("infill-copy").hidden = $("infill-use").hidden = fills.length === 0;
  }
}

// --- Chat ------------------------------------------------------------------------------------------------------------

/**
 * Splits an answer at its ``` fences. An open fence lasts to the end, so that code shows as code while it comes.
 * @returns {{code: boolean, text: string, language: string}[]}
 */
function blocks(text) {
  const found = [];
  let open = "";
  let current = { code: false, text: "", language: "" };
  const close = () => {
    if (current.code || current.text.trim()) found.push(current);
  };
  for (const line of text.split(/(?<=\n)/)) {
    const [, fence, language] = /^ {0,3}(`{3,}|~{3,})([^`\n]*)/.exec(line) ?? [];
    if (fence && !open) {
      close();
      open = fence;
      current = { code: true, text: "", language: language.trim() };
    } else if (open && fence?.startsWith(open) && !language.trim()) {
      close();
      open = "";
      current = { code: false, text: "", language: "" };
    } else {
      current.text += line;
    }
  }
  close();
  return found;
}

/** Draws an answer into a place. What has not changed since the last call stays as it is, selections included. */
function drawAnswer(place, text) {
  const parts = blocks(text);
  parts.forEach((part, i) => {
    const kind = part.code ? `code ${part.language}` : "prose";
    let node = place.children[i];
    if (node?.dataset.kind !== kind) {
      const made = part.code ? codeBlock(part.language) : element("p", "prose");
      made.dataset.kind = kind;
      if (node) node.replaceWith(made);
      else place.append(made);
      node = made;
    }
    const shown = part.code ? part.text.replace(/\n$/, "") : part.text.trim();
    const target = part.code ? node.querySelector("code") : node;
    if (target.shown === shown) return;
    target.shown = shown;
    target.replaceChildren(...(part.code ? [shown] : inline(shown)));
  });
  while (place.children.length > parts.length) place.lastChild.remove();
}

function codeBlock(language) {
  const block = element("div", "block");
  const bar = element("div", "block-bar");
  const code = element("code");
  const pre = element("pre");
  pre.tabIndex = 0;
  pre.append(code);
  bar.append(element("span", "", language || "code"));
  bar.append(button("Copy", (event) => copy(code.textContent, event.target), "plain"));
  block.append(bar, pre);
  return block;
}

/** `code` within a line. */
function inline(text) {
  return text.split(/(`[^`\n]+`)/).filter(Boolean).map((part) =>
    part.length > 2 && part.startsWith("`") && part.endsWith("`") ? element("code", "", part.slice(1, -1)) : part);
}

class Chat {
  constructor() {
    this.input = $("chat-input");
    this.log = $("chat-log");
    this.job = new Job("chat", () => this.send(this.input.value));
    keepDraft(this.input, "chat");
    $("chat-form").addEventListener("submit", (event) => event.preventDefault());
    this.input.addEventListener("input", () => grow(this.input));
    this.input.addEventListener("keydown", (event) => this.key(event));
    $("chat").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.job.running) this.job.stop();
    });
    $("chat-system").value = state.chat.system;
    $("chat-system-box").open = state.chat.system !== "";
    $("chat-system").addEventListener("input", (event) => { state.chat.system = event.target.value; save(); });
    $("chat-new").addEventListener("click", () => this.clear());
    this.draw();
  }

  get messages() {
    return state.chat.messages;
  }

  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!this.job.running) this.send(this.input.value);
  }

  send(text) {
    if (!text.trim()) {
      this.input.focus();
      return;
    }
    this.messages.push({ role: "user", content: text });
    this.input.value = state.drafts.chat = "";
    grow(this.input);
    this.answer();
  }

  /** Asks for an answer to the conversation as it stands. */
  async answer() {
    this.job.stop();
    while (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    const asked = this.messages.map(({ role, content }) => ({ role, content }));
    if (state.chat.system.trim()) asked.unshift({ role: "system", content: state.chat.system });
    const reply = { role: "assistant", content: "", note: "" };
    this.messages.push(reply);
    this.draw();
    this.input.focus();
    const end = await this.job.run((signal, pace) => this.receive(asked, reply, signal, pace), () => this.answer());
    if (end === "stopped") reply.note = [reply.note, "stopped"].filter(Boolean).join(" · ");
    if (end === "failed" && reply.content) reply.note = "incomplete";
    this.finish(reply, end);
    saveNow();
    drawContext();
    if (end === "done") announce("The answer is complete.");
  }

  /** Gives the answer its buttons, or takes it away where nothing came. An edit elsewhere in the list is left alone. */
  finish(reply, end) {
    const i = this.messages.indexOf(reply);
    if (i < 0) return;
    if (reply.content || end === "done") {
      this.followEnd(() => this.log.children[i].querySelector(".foot").replaceWith(this.foot(reply, i)));
    } else {
      this.messages.splice(i, 1);
      this.log.children[i].remove();
    }
  }

  bodyOf(message) {
    return this.log.children[this.messages.indexOf(message)]?.querySelector(".body");
  }

  async receive(asked, reply, signal, pace) {
    let reason = "";
    const body = { ...sampling(), messages: asked };
    try {
      for await (const event of stream("v1/chat/completions", body, signal)) {
        pace.see(event);
        const choice = event.choices?.[0];
        reason = choice?.finish_reason ?? reason;
        const text = choice?.delta?.content;
        if (!text) continue;
        reply.content += text;
        const place = this.bodyOf(reply);
        if (place) this.followEnd(() => drawAnswer(place, reply.content));
        save();
      }
    } finally {
      if (pace.used) state.chat.used = pace.used;
      if (pace.tokens) reply.note = pace.words();
    }
    if (reason === "length") reply.note += " · ended at max tokens";
    if (reason === "content_filter") reply.note += " · withheld by the server’s filter";
    return "";
  }

  /** Draws, and stays at the end of the conversation if the reader was there. */
  followEnd(draw) {
    const scroll = $("chat-scroll");
    const atEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 40;
    draw();
    if (atEnd) scroll.scrollTop = scroll.scrollHeight;
  }

  draw() {
    $("chat-welcome").hidden = this.messages.length > 0;
    $("chat-new").hidden = this.messages.length === 0;
    this.followEnd(() => this.log.replaceChildren(...this.messages.map((one, i) => this.drawMessage(one, i))));
    drawContext();
  }

  drawMessage(one, i) {
    const mine = one.role === "user";
    const item = element("li", mine ? "mine" : "answer");
    const body = element("div", "body");
    drawAnswer(body, one.content);
    if (!one.content) body.append(element("p", "faint", "…"));
    item.append(element("h2", "quiet", mine ? "You" : "Model"), body, this.foot(one, i));
    return item;
  }

  /** The buttons of a message; none below an answer that is still coming. */
  foot(one, i) {
    const foot = element("div", "foot");
    const last = i + 1 === this.messages.length;
    if (one.role === "user") {
      foot.append(button("Edit", () => this.edit(i), "plain"));
    } else if (!last || !this.job.running) {
      foot.append(button("Copy", (event) => copy(one.content, event.target), "plain"));
      foot.append(button("Retry", () => this.retry(i), "plain"));
    }
    if (one.note) foot.append(element("span", "note", one.note));
    return foot;
  }

  retry(i) {
    this.messages.length = i;
    this.answer();
  }

  /** Puts a field in a message's place. Sending it drops all that followed. */
  edit(i) {
    const item = this.log.children[i];
    const area = element("textarea");
    const row = element("div", "foot");
    const send = () => {
      if (!area.value.trim()) return;
      this.job.stop();
      this.messages.length = i;
      this.messages.push({ role: "user", content: area.value });
      this.answer();
    };
    const cancel = () => {
      item.replaceWith(this.drawMessage(this.messages[i], i));
      this.log.children[i].querySelector(".foot button").focus();
    };
    area.setAttribute("aria-label", "Edit message");
    area.value = this.messages[i].content;
    area.addEventListener("input", () => grow(area));
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        cancel();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        send();
      }
    });
    row.append(button("Send again", send, "primary"), button("Cancel", cancel, "plain"));
    item.classList.add("editing");
    item.replaceChildren(area, row);
    grow(area);
    area.focus();
  }

  clear() {
    this.job.stop();
    this.job.forgive();
    this.job.say("");
    state.chat.messages = [];
    state.chat.used = 0;
    saveNow();
    this.draw();
    this.input.focus();
  }
}

function drawContext() {
  const { used } = state.chat;
  $("chat-context").hidden = !used || !state.chat.messages.length;
  const share = server.context ? Math.min(1, used / server.context) : 0;
  const of = server.context ? ` of ${NUMBER.format(server.context)} tokens` : " tokens";
  const full = share > 0.9 ? ": nearly full" : "";
  $("chat-context").querySelector(".words").textContent = `context ${NUMBER.format(used)}${of}${full}`;
  $("chat-context").querySelector(".bar").style.setProperty("--share", share);
}

// --- Tokens ----------------------------------------------------------------------------------------------------------

const BOS = 1; // the id of <s> in every Llama tokenizer

/** A token, and in `others` the most probable ones as [text, logprob]. The first of a text has no logprob: null. */
class Token {
  constructor(text, id, logprob, others) {
    Object.assign(this, { text, id, logprob, others });
  }

  get probability() {
    return this.logprob === null ? null : Math.exp(this.logprob);
  }

  get shade() {
    if (this.logprob === null) return "none";
    return `p${[0.01, 0.1, 0.3, 0.6, 0.9].filter((limit) => this.probability >= limit).length}`;
  }
}

function percent(probability) {
  if (probability === null) return "no probability: nothing comes before it";
  const hundred = probability * 100;
  if (hundred >= 99.95) return "100 %";
  if (hundred < 0.01) return "< 0.01 %";
  return `${hundred.toPrecision(hundred < 1 ? 2 : 3)} %`;
}

/** A token's text with its invisible characters made visible. */
function visible(text) {
  const signs = { " ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍" };
  return text === "" ? "(empty)" : text.replace(/[ \n\t\r]/g, (sign) => signs[sign]);
}

/** A piece of /tokenize: text, or the bytes of an incomplete character. */
function pieceText(piece) {
  if (!Array.isArray(piece)) return String(piece);
  return piece.map((byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
}

class TokenView {
  constructor() {
    this.area = $("tokens-text");
    this.count = $("tokens-count");
    this.job = new Job("tokens", () => this.show());
    keepDraft(this.area, "tokens");
    runKeys(this.area, this.job);
    this.count.value = state.count;
    this.count.addEventListener("change", () => {
      if (this.count.checkValidity() && this.count.value !== "") state.count = Number(this.count.value);
      save();
    });
    for (const flow of [$("tokens-prompt"), $("tokens-answer")]) this.listen(flow);
  }

  async show() {
    if (!this.area.value) return this.job.say("Write a prompt first.");
    if (!this.count.reportValidity()) return undefined;
    this.prompt = [];
    this.answer = [];
    $("tokens-detail").replaceChildren();
    const end = await this.job.run((signal, pace) => this.receive(this.area.value, signal, pace));
    if (end === "done") announce(`${this.prompt.length} prompt tokens, ${this.answer.length} new tokens`);
    return undefined;
  }

  /** One echoed completion gives the probabilities of prompt and answer, /tokenize the ids of the prompt. */
  async receive(prompt, signal, pace) {
    const asked = ask("tokenize", { content: prompt, with_pieces: true }, signal).then((response) => response.json());
    asked.catch(() => {}); // it is awaited below, unless the completion fails first
    const more = { echo: true, logprobs: 5, max_tokens: Number(this.count.value) };
    const got = [];
    let ids = null;
    let newIds = [];
    const place = () => {
      ids = alignBos(ids, got);
      this.prompt = got.slice(0, ids.length);
      this.answer = got.slice(ids.length);
      this.prompt.forEach((token, i) => { token.id = ids[i]; });
      this.answer.forEach((token, i) => { token.id = newIds[i] ?? token.id; });
      this.draw();
    };
    for await (const choice of complete(prompt, "", signal, pace, more)) {
      got.push(...readLogprobs(choice.logprobs));
      if (choice.prompt_token_ids) ids = choice.prompt_token_ids;
      if (choice.token_ids) newIds = newIds.concat(choice.token_ids);
      ids ??= (await asked).tokens.map((one) => one.id);
      place();
    }
    const pieces = (await asked).tokens.map((one) => ({ id: one.id, text: pieceText(one.piece) }));
    if (!got.length) got.push(...pieces.map((one) => new Token(one.text, one.id, null, [])));
    ids ??= pieces.map((one) => one.id);
    place();
    return this.summary(pace);
  }

  summary(pace) {
    const known = [...this.prompt, ...this.answer].filter((token) => token.logprob !== null);
    const counts = `${NUMBER.format(this.prompt.length)} + ${NUMBER.format(this.answer.length)} tokens`;
    if (!known.length) return `${counts} · the server sends no probabilities`;
    const mean = known.reduce((sum, token) => sum + token.logprob, 0) / known.length;
    const rate = pace.words().split(" · ")[1];
    return [counts, `perplexity ${Math.exp(-mean).toPrecision(3)}`, rate].filter(Boolean).join(" · ");
  }

  draw() {
    $("tokens-look").hidden = false;
    this.fillFlow($("tokens-prompt"), this.prompt);
    this.fillFlow($("tokens-answer"), this.answer);
    const titles = { prompt: "Prompt", answer: "Answer" };
    for (const [part, title] of Object.entries(titles)) {
      const empty = this[part].length === 0;
      $(`tokens-${part}-title`).textContent = title;
      $(`tokens-${part}-title`).hidden = $(`tokens-${part}`).hidden = empty;
    }
    if (!$("tokens-detail").childElementCount) {
      const hint = "Point at a token, or move to it with the arrow keys, to see which others were probable here.";
      $("tokens-detail").append(element("p", "faint", hint));
    }
  }

  /** Appends what is new; tokens already drawn keep their focus. */
  fillFlow(flow, tokens) {
    while (flow.children.length > tokens.length) flow.lastChild.remove();
    tokens.forEach((token, i) => {
      const known = flow.children[i];
      if (known?.token === token) return;
      const made = this.drawToken(token, i);
      if (known) known.replaceWith(made);
      else flow.append(made);
    });
  }

  drawToken(token, i) {
    const made = element("span", `token ${token.shade}`, token.text.replaceAll("\n", "↵\n") || "∅");
    made.token = token;
    made.tabIndex = i === 0 ? 0 : -1;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", "false");
    made.setAttribute("aria-label", `${visible(token.text)}, ${percent(token.probability)}`);
    return made;
  }

  listen(flow) {
    const of = (event) => event.target.closest(".token");
    flow.addEventListener("mouseover", (event) => of(event) && this.detail(of(event)));
    flow.addEventListener("focusin", (event) => of(event) && this.detail(of(event)));
    flow.addEventListener("click", (event) => of(event)?.focus());
    flow.addEventListener("keydown", (event) => {
      const all = [...flow.children];
      const at = all.indexOf(of(event));
      const ends = { Home: 0, End: all.length - 1 };
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, ...ends }[event.key];
      if (to === undefined || at < 0) return;
      event.preventDefault();
      const next = all[Math.max(0, Math.min(all.length - 1, to))];
      all[at].tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  detail(node) {
    const { token } = node;
    for (const chosen of $("tokens").querySelectorAll("[aria-selected=true]")) {
      chosen.setAttribute("aria-selected", "false");
    }
    node.setAttribute("aria-selected", "true");
    const facts = element("dl");
    const fact = (name, value) => facts.append(element("dt", "", name), element("dd", "", value));
    fact("id", token.id === undefined ? "not sent by the server" : String(token.id));
    fact("probability", percent(token.probability));
    if (token.logprob !== null) fact("log p", token.logprob.toFixed(3).replace("-", "−"));
    $("tokens-detail").replaceChildren(element("p", "big", visible(token.text)), facts, ...this.others(token));
  }

  others(token) {
    if (token.logprob === null) return [];
    if (!token.others.length) return [element("p", "faint", "The server sends no others for this token.")];
    const table = element("table");
    table.append(element("caption", "", "Most probable here"));
    for (const [text, logprob] of token.others) {
      const row = table.insertRow();
      const bar = element("span", "bar");
      bar.style.setProperty("--share", Math.exp(logprob));
      row.className = text === token.text ? "chosen" : "";
      const name = element("th", "", visible(text));
      name.scope = "row";
      row.append(name);
      row.insertCell().append(bar);
      row.insertCell().textContent = percent(Math.exp(logprob));
    }
    return [table];
  }
}

/** The prompt's ids with <s> in front exactly if the echoed tokens begin with it. */
function alignBos(ids, tokens) {
  if (!tokens.length) return ids;
  const echoed = tokens[0].text === "<s>";
  if (echoed && ids[0] !== BOS) return [BOS, ...ids];
  return !echoed && ids[0] === BOS ? ids.slice(1) : ids;
}

/** Tokens out of the logprobs of a completion's chunk, in OpenAI's shape. */
function readLogprobs(logprobs) {
  return (logprobs?.tokens ?? []).map((text, i) => {
    const others = Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]);
    return new Token(String(text), undefined, logprobs.token_logprobs?.[i] ?? null, others);
  });
}

// --- settings --------------------------------------------------------------------------------------------------------

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

function drawTheme() {
  document.documentElement.dataset.theme = state.theme;
  $("theme").setAttribute("aria-label", `Colours: ${THEMES[state.theme] ?? THEMES.auto}`);
  $("theme").title = $("theme").getAttribute("aria-label");
}

function nextTheme() {
  const names = Object.keys(THEMES);
  state.theme = names[(names.indexOf(state.theme) + 1) % names.length];
  drawTheme();
  announce($("theme").title);
  saveNow();
}

function openSettings(field) {
  drawSettings();
  $("settings").showModal();
  if (field) $(field).select();
}

function drawSettings() {
  for (const name of Object.keys(SAMPLING)) {
    if (name !== "model") $(`set-${name}`).value = state.settings[name];
  }
  $("set-key").value = apiKey();
  drawFacts();
}

function drawFacts() {
  $("set-model-row").hidden = server.models.length < 2;
  $("set-model").replaceChildren(...server.models.map((name) => element("option", "", name)));
  $("set-model").value = model();
  $("settings-facts").replaceChildren();
  if (server.state !== "ready") return;
  const context = server.context ? `${NUMBER.format(server.context)} tokens` : "";
  for (const [name, value] of Object.entries({ Model: model(), Checkpoint: server.path, Context: context })) {
    if (value) $("settings-facts").append(element("dt", "", name), element("dd", "", value));
  }
}

function listenToSettings() {
  for (const [name, usual] of Object.entries(SAMPLING)) {
    const field = $(`set-${name}`);
    field.addEventListener("change", () => {
      if (!field.checkValidity()) return; // the browser says why when the dialog is closed
      state.settings[name] = typeof usual === "number" ? Number(field.value) : field.value;
      if (name === "model") $("connection-text").textContent = model();
      saveNow();
    });
  }
  $("set-key").addEventListener("change", () => {
    try {
      sessionStorage.setItem(STORE, $("set-key").value.trim());
    } catch { /* storage is forbidden: a key cannot be kept */ }
    connect();
  });
  $("defaults").addEventListener("click", () => {
    Object.assign(state.settings, SAMPLING);
    drawSettings();
    saveNow();
  });
  $("settings").addEventListener("click", (event) => {
    if (event.target === $("settings")) $("settings").close(); // a click beside it
  });
  $("settings").addEventListener("close", () => askTwice($("clear"), false));
}

/** A button that asks before it acts: the first click changes its words. */
function askTwice(clicked, sure) {
  clicked.dataset.words ??= clicked.textContent;
  clicked.dataset.sure = sure ? "yes" : "";
  clicked.textContent = sure ? "Really clear? Click again" : clicked.dataset.words;
}

function clearAll(tabs) {
  if (!$("clear").dataset.sure) return askTwice($("clear"), true);
  askTwice($("clear"), false);
  for (const name of Object.keys(tabs)) {
    tabs[name].job.stop();
    state.drafts[name] = "";
    (tabs[name].area ?? tabs[name].input).value = "";
  }
  state.chat.system = $("chat-system").value = "";
  tabs.chat.clear();
  tabs.complete.dismiss();
  tabs.infill.draw([], []);
  $("tokens-look").hidden = true;
  $("settings").close();
  announce("Cleared");
  return undefined;
}

// --- start -----------------------------------------------------------------------------------------------------------

function showTab(name) {
  state.tab = name;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const chosen = tab.getAttribute("aria-controls") === name;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  grow($("chat-input"));
  if (name === "chat") $("chat-scroll").scrollTop = $("chat-scroll").scrollHeight;
  history.replaceState(null, "", `#${name}`);
  save();
}

function listenToTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const names = tabs.map((tab) => tab.getAttribute("aria-controls"));
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => showTab(names[i]));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const next = (to + tabs.length) % tabs.length;
      showTab(names[next]);
      tabs[next].focus();
    });
  });
  const asked = () => names.find((name) => location.hash === `#${name}`);
  window.addEventListener("hashchange", () => asked() && showTab(asked()));
  showTab(asked() ?? (names.includes(state.tab) ? state.tab : names[0]));
}

document.addEventListener("DOMContentLoaded", () => {
  drawExamples();
  const tabs = { complete: new Completer(), infill: new Infiller(), chat: new Chat(), tokens: new TokenView() };
  $("theme").addEventListener("click", nextTheme);
  $("open-settings").addEventListener("click", () => openSettings());
  $("clear").addEventListener("click", () => clearAll(tabs));
  listenToSettings();
  listenToTabs();
  drawTheme();
  window.addEventListener("pagehide", saveNow);
  connect();
});
