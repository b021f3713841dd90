// The API page: tabs of examples, copying, the key, and forms that send a request to this server.
import { apiKey, themeButton } from "./server.js";

const LONGEST = 200_000; // characters of an answer that are shown

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function makeTabs(place) {
  // Tabs (https://www.w3.org/WAI/ARIA/apg/patterns/tabs/) of the examples in `place`, which stand below each other without a script.
  const panels = [...place.querySelectorAll("pre")];
  const list = element("div", { className: "tablist", role: "tablist" });
  list.setAttribute("aria-label", "Language");
  const tabs = panels.map((panel, i) => {
    panel.id = `${place.dataset.name}-${panel.dataset.kind}`;
    const tab = element("button", { type: "button", role: "tab", id: `${panel.id}-tab`, textContent: panel.dataset.kind });
    tab.setAttribute("aria-controls", panel.id);
    panel.setAttribute("role", "tabpanel");
    panel.setAttribute("aria-labelledby", tab.id);
    panel.removeAttribute("aria-label");
    tab.addEventListener("click", () => choose(i));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      choose((i + step + tabs.length) % tabs.length).focus();
    });
    return tab;
  });
  function choose(chosen) {
    tabs.forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === chosen));
      tab.tabIndex = i === chosen ? 0 : -1;
      panels[i].hidden = i !== chosen;
    });
    return tabs[chosen];
  }
  list.append(...tabs);
  const copy = element("button", { type: "button", className: "copy", textContent: "Copy" });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(panels.find((panel) => !panel.hidden).textContent);
      copy.textContent = "Copied";
    } catch { copy.textContent = "Copying is not allowed"; }
    setTimeout(() => { copy.textContent = "Copy"; }, 1500);
  });
  place.prepend(element("div", { className: "tabbar" }, list, copy));
  choose(0);
}

function request(form) {
  // The address and the options of the request that a form describes; throws SyntaxError if its body is not JSON.
  let path = form.dataset.path.slice(1);
  const query = new URLSearchParams();
  for (const input of form.querySelectorAll("input")) {
    if (input.dataset.place === "path") path = path.replace(`{${input.name}}`, encodeURIComponent(input.value));
    else if (input.value !== "") query.set(input.name, input.value);
  }
  const headers = {};
  if (apiKey() && path.startsWith("v1/")) headers.Authorization = `Bearer ${apiKey()}`;
  const body = form.elements.namedItem("body")?.value;
  if (body !== undefined) {
    JSON.parse(body);
    headers["Content-Type"] = "application/json";
  }
  const address = query.size ? `${path}?${query}` : path;
  return [address, { method: form.dataset.verb.toUpperCase(), headers, body }];
}

function readable(text, type) {
  if (!type.includes("json")) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

async function send(form) {
  const place = form.parentElement;
  const outcome = place.querySelector(".outcome");
  const answer = place.querySelector(".answer");
  const button = form.querySelector("button");
  outcome.textContent = "Waiting for the answer …";
  button.disabled = true;
  const started = performance.now();
  try {
    const response = await fetch(...request(form));
    const text = readable(await response.text(), response.headers.get("Content-Type") ?? "");
    outcome.textContent = `${response.status} ${response.statusText} in ${Math.round(performance.now() - started)} ms`;
    answer.textContent = text.length > LONGEST ? `${text.slice(0, LONGEST)}\n… (${text.length.toLocaleString("en")} characters)` : text;
    answer.hidden = text === "";
  } catch (problem) {
    answer.hidden = true;
    outcome.textContent = problem instanceof SyntaxError ? `The body is not JSON: ${problem.message}`
      : "The server cannot be reached; is search-r3 serve still running?";
  } finally {
    button.disabled = false;
  }
}

const theme = document.getElementById("theme");
themeButton(theme);
theme.hidden = false;

document.querySelectorAll(".tabs").forEach(makeTabs);
for (const place of document.querySelectorAll(".try")) {
  place.hidden = false;
  const form = place.querySelector("form");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form);
  });
}
const keyForm = document.getElementById("key-form");
if (keyForm) {
  const field = document.getElementById("key");
  keyForm.hidden = false;
  field.value = apiKey();
  field.addEventListener("input", () => apiKey(field.value.trim()));
  keyForm.addEventListener("submit", (event) => event.preventDefault());
}
