// Runs page.js without a browser, on the little of the DOM that it uses. From stdin: names of the form's fields, facts,
// the address, events that the server answers with. Prints what the page has then.
"use strict";
const { readFileSync } = require("node:fs");
const vm = require("node:vm");

const given = JSON.parse(readFileSync(0, "utf8"));

class Element {
  constructor(id) {
    Object.assign(this, { id, children: [], attributes: {}, listeners: {}, styles: {}, className: "", value: "", own: "" });
    this.style = { setProperty: (name, value) => (this.styles[name] = value) };
    this.classList = { add() {}, remove() {}, toggle() {} };
  }
  get textContent() {
    return this.own + this.children.map((child) => child.textContent).join("");
  }
  set textContent(text) {
    this.children = [];
    this.own = String(text);
  }
  set innerHTML(html) {
    throw new Error("HTML");
  }
  append(...children) {
    this.children.push(...children);
  }
  replaceChildren(...children) {
    this.own = "";
    this.children = children;
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  addEventListener(kind, listener) {
    this.listeners[kind] = listener;
  }
  closest() {
    return this.className.split(" ").includes("token") ? this : null;
  }
  getClientRects() {
    return [this.getBoundingClientRect()];
  }
  getBoundingClientRect() {
    return { left: 0, top: 0, bottom: 0 };
  }
  focus() {}
}

const elements = {};
const get = (id) => (elements[id] ||= new Element(id));
const form = get("form");
form.elements = given.fields.map((name) => Object.assign(get(name), { name, type: name === "special_tokens" ? "checkbox" : "text" }));
form.prompt = get("prompt");
const documentElement = { clientWidth: 400, clientHeight: 400 };
const document = Object.assign(new Element("document"), { documentElement, getElementById: get, createElement: () => new Element() });

const asked = [];
let copied = null;
let signal = null;
let answer = null;
const context = vm.createContext({
  document, Element, URLSearchParams, TextDecoderStream, AbortController, JSON, Math, Object, String, Promise,
  location: { origin: "http://127.0.0.1:8000", pathname: "/", search: given.search },
  history: { replaceState() {} },
  window: { scrollX: 0, scrollY: 0 },
  navigator: { clipboard: { writeText: async (text) => (copied = text) } },
  fetch: async (path, options) => {
    if (path === "facts") return { json: async () => given.facts };
    asked.push(JSON.parse(options.body));
    signal = options.signal;
    return answer();
  },
});

function streamed() {
  const text = given.events.map((event) => `event: ${event.event}\ndata: ${JSON.stringify(event)}\n\n`).join("");
  const bytes = new TextEncoder().encode(text);
  const parts = [];
  for (let i = 0; i < bytes.length; i += 7) parts.push(bytes.slice(i, i + 7)); // in the midst of characters and lines
  return new Response(ReadableStream.from(parts));
}

const words = (text) => text.children.map((child) => [child.textContent, child.styles["--s"]]);
const settled = () => new Promise((resolve) => setTimeout(resolve, 20));

async function main() {
  vm.runInContext(readFileSync(given.page, "utf8"), context);
  await settled();
  const found = { begun: asked.length };
  await get("copy").listeners.click();
  found.copied = copied;
  get("special_tokens").checked = false;
  await get("copy").listeners.click();
  found.unticked = copied;
  get("special_tokens").checked = true;
  answer = streamed;
  form.listeners.submit({ preventDefault() {} });
  await settled();
  found.asked = asked[0];
  found.status = get("status").textContent;
  const articles = get("models").children;
  found.models = articles.map(({ children: [name, facts, text, note] }) => ({
    name: name.textContent, facts: facts.textContent, words: words(text), note: note.textContent,
  }));
  found.cards = articles[0].children[2].children.slice(1).map((word) => {
    document.listeners.pointerover({ pointerType: "mouse", target: word });
    return get("card").children.map((list) => list.children.map((row) => [row.className, ...row.children.map((cell) => cell.textContent)]));
  });
  answer = async () => new Response(JSON.stringify({ errors: given.errors }), { status: 422 });
  form.listeners.submit({ preventDefault() {} });
  await settled();
  found.errors = Object.fromEntries(given.fields.map((name) => [name, get(`${name}-error`).textContent]));
  answer = () => new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("aborted"))));
  form.listeners.submit({ preventDefault() {} });
  get("stop").listeners.click();
  await settled();
  found.stopped = get("status").textContent;
  console.log(JSON.stringify(found));
}

main();
