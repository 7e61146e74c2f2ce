"use strict";
// Texts come from models and from links, and are only ever inserted as text.

const form = document.getElementById("form");
const [write, stop, copy, status, card] = ["write", "stop", "copy", "status", "card"].map((id) => document.getElementById(id));
const fields = [...form.elements].filter((element) => element.name);
let models = []; // what is known of each, and where on the page it is
let running = null; // the AbortController of the request in flight
let shown = null; // the word whose alternatives are shown

function made(kind, className, text, parent) {
  const element = document.createElement(kind);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

// --- the form, and links to it

function values() {
  return Object.fromEntries(fields.map((field) => [field.name, field.type === "checkbox" ? (field.checked ? "1" : "") : field.value]));
}

function fill(given) {
  for (const field of fields) {
    if (!(field.name in given)) continue;
    if (field.type === "checkbox") field.checked = given[field.name] === "1";
    else field.value = given[field.name];
  }
}

function link() {
  return `${location.origin}${location.pathname}?${new URLSearchParams(values())}`;
}

function sayErrors(errors) {
  for (const field of fields) {
    const said = errors[field.name] || "";
    document.getElementById(`${field.name}-error`).textContent = said;
    field.setAttribute("aria-invalid", String(Boolean(said)));
  }
  const wrong = fields.find((field) => errors[field.name]);
  if (wrong) wrong.focus();
  say(errors[""] || (wrong ? "Nothing was written: see above." : ""), true);
}

function say(text, error = false) {
  status.textContent = text;
  status.classList.toggle("error", error && Boolean(text));
}

// --- the models

function tokens(count) {
  return `${count.toLocaleString("en")} token${count === 1 ? "" : "s"}`;
}

function introduce(facts) {
  const known = [];
  if (facts.step !== null) known.push(`step ${facts.step.toLocaleString("en")}`);
  known.push(`${(facts.parameters / 1e6).toFixed(1)}M parameters`, `context of ${facts.context.toLocaleString("en")} tokens`, facts.computes);
  const article = made("article", "", undefined, document.getElementById("models"));
  const name = made("h2", "", undefined, article);
  for (const part of facts.name.split(/(?<=[/_])/)) {
    made("span", "", part, name);
    made("wbr", "", undefined, name); // where a path may break
  }
  made("p", "facts", known.join("; "), article);
  const text = made("p", "text", "", article);
  text.tabIndex = 0;
  text.setAttribute("aria-label", `What ${facts.name} writes; arrow keys go from word to word`);
  return { facts, text, note: made("p", "hint", "", article), count: 0, nats: 0 };
}

// the prompt over a text: of a long one the end, which the text goes on from
function beginning(prompt) {
  const characters = [...prompt];
  return characters.length > 400 ? `… ${characters.slice(-300).join("")}` : prompt;
}

// from 1 down to chance, on a logarithmic scale
function strength(p, vocabulary) {
  return p > 0 ? Math.min(Math.max(-Math.log(p) / Math.log(vocabulary), 0), 1) : 1;
}

function percent(p) {
  return p === null ? "no probability" : `${Number((100 * p).toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 })} %`;
}

function visible(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

function word(model, text, p, drawn, className = "token") {
  const element = made("span", text.includes("\n") ? `${className} newline` : className, text, model.text);
  element.style.setProperty("--s", strength(p, model.facts.vocabulary).toFixed(3));
  element.tokens = drawn;
}

function count(model, drawn) {
  for (const { p } of drawn) {
    model.count += 1;
    model.nats -= Math.log(p);
  }
}

const on = {
  waiting({ before }) {
    say(before === 1 ? "Waiting: you are next, after one other visitor." : `Waiting: ${before} other visitors come before you.`);
  },
  start(event) {
    say("Writing …");
    event.models.forEach(({ tokens: count, note }, i) => {
      const begun = `${tokens(count)} in the prompt`;
      models[i].begun = note ? `${begun}; ${note}` : begun;
      models[i].note.textContent = `${models[i].begun}.`;
    });
  },
  piece({ model: i, text, p, tokens: drawn }) {
    count(models[i], drawn);
    word(models[i], text, p, drawn);
  },
  end({ model: i, why, tokens: last }) {
    const model = models[i];
    for (const token of last) word(model, token.text, token.p, [token], "token mark");
    const written = `${tokens(model.count)} written`;
    const perplexity = model.count ? `; perplexity ${Number(Math.exp(model.nats / model.count).toPrecision(3)).toLocaleString("en")}` : "";
    const ended = why === "length" ? "" : ", then the end of the text";
    model.note.textContent = `${model.begun}. ${written}${ended}${perplexity}.`;
  },
  done() {
    say("Done.");
  },
  failed({ says }) {
    say(says, true);
  },
};

// --- writing

async function* messages(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice("data: ".length));
    }
  }
}

async function begin() {
  if (running) return;
  const control = (running = new AbortController());
  hide();
  sayErrors({});
  write.disabled = true;
  stop.disabled = false;
  try {
    const asked = values();
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("write", { method: "POST", headers, body: JSON.stringify(asked), signal: control.signal });
    if (response.status === 422) {
      sayErrors((await response.json()).errors);
    } else if (!response.ok) {
      say(await response.text(), true);
    } else {
      history.replaceState(null, "", link());
      for (const model of models) {
        model.text.replaceChildren(made("b", "", beginning(asked.prompt)));
        model.note.textContent = "";
        model.count = model.nats = 0;
      }
      let ended = false;
      for await (const event of messages(response)) {
        on[event.event](event);
        ended = event.event === "done" || event.event === "failed";
      }
      if (!ended) say("The connection ended before the text did; generate again.", true);
    }
  } catch (error) {
    if (control.signal.aborted) say("Stopped.");
    else say("The server does not answer; see whether it still runs.", true);
  } finally {
    running = null;
    write.disabled = false;
    stop.disabled = true;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
form.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) begin();
});
stop.addEventListener("click", () => running && running.abort());
copy.addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(link());
    say("Link copied.");
  } catch {
    history.replaceState(null, "", link()); // a page that is not from this machine may not write to the clipboard
    say("The link is in the address bar; copy it from there.");
  }
});

// --- what else was likely

function alternatives(element) {
  card.replaceChildren();
  element.tokens.forEach((token, i) => {
    if (element.tokens.length > 1) made("p", "", `token ${i + 1} of ${element.tokens.length}`, card);
    const list = made("ol", "", undefined, card);
    const rows = [...token.likeliest];
    if (!rows.some((row) => row.token === token.token)) rows.push(token);
    for (const row of rows) {
      const item = made("li", row.token === token.token ? "drawn" : "", undefined, list);
      item.style.setProperty("--p", row.p === null ? 0 : row.p);
      made("span", "", visible(row.text), item);
      made("span", "", percent(row.p), item);
    }
  });
}

function show(element) {
  hide();
  shown = element;
  element.classList.add("shown");
  alternatives(element);
  card.hidden = false;
  const [first, view] = [element.getClientRects()[0], document.documentElement];
  const left = Math.min(Math.max(first.left, 8), view.clientWidth - card.offsetWidth - 8);
  const below = first.bottom + 6 + card.offsetHeight <= view.clientHeight || first.top < card.offsetHeight + 6;
  const top = below ? element.getBoundingClientRect().bottom + 6 : first.top - card.offsetHeight - 6;
  card.style.left = `${left + window.scrollX}px`;
  card.style.top = `${top + window.scrollY}px`;
}

function hide() {
  if (shown) shown.classList.remove("shown");
  shown = null;
  card.hidden = true;
}

const wordOf = (event) => (event.target instanceof Element && event.target.closest("#models .token")) || null;
document.addEventListener("pointerover", (event) => {
  if (event.pointerType !== "mouse") return;
  const element = wordOf(event);
  if (element) show(element);
  else hide();
});
document.addEventListener("click", (event) => {
  const element = wordOf(event);
  if (element && (element !== shown || event.pointerType === "mouse")) show(element);
  else hide();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || !(event.target instanceof Element) || !event.target.matches(".text")) return;
  const words = [...event.target.querySelectorAll(".token")];
  const at = words.indexOf(shown);
  const next = words[at < 0 ? (step > 0 ? 0 : words.length - 1) : at + step];
  if (next) show(next);
  event.preventDefault();
});

// --- the beginning: nothing is written before it is asked for

async function load() {
  try {
    const facts = await (await fetch("facts")).json();
    models = facts.models.map(introduce);
    fill(facts.form);
    fill(Object.fromEntries(new URLSearchParams(location.search)));
    const vocabulary = Math.max(...facts.models.map((model) => model.vocabulary));
    const scale = document.getElementById("scale");
    for (const p of [1, 0.1, 0.01, 0.001, 1 / vocabulary]) {
      const step = p * vocabulary > 1.5 ? percent(p) : `1 in ${vocabulary.toLocaleString("en")}`;
      made("span", "token", step, scale).style.setProperty("--s", strength(p, vocabulary).toFixed(3));
    }
    write.disabled = copy.disabled = false;
  } catch {
    say("The server does not answer; see whether it still runs, and reload the page.", true);
  }
}

load();
