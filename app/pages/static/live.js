// Keeps a page live, with nothing but the browser. Without this file every page still works.
//
// The stream in <body data-stream> sends {id, html}; the element with that id gets the HTML. Focus, open details and
// scrolled boxes inside it stay. While somebody edits a field inside it, the fragment waits until the field is left.
// A form with data-quiet is sent in the background: the stream shows its effect.

const waiting = new Map();
const shown = new Map();
const connection = document.getElementById("connection");
let stream;
let retry;
let silence;

function say(text) {
  clearTimeout(silence);
  silence = undefined;
  connection.textContent = text;
  connection.hidden = !text;
}

function isEdited(field) {
  return field.matches("textarea, select, input:not([type=checkbox], [type=radio], [type=hidden], [type=submit])");
}

// How to find an element again after its fragment was replaced: by its id, else by what it does.
function findAgain(element) {
  if (element.id) return `#${CSS.escape(element.id)}`;
  if (element.localName === "summary") return `#${CSS.escape(element.parentElement.id)} > summary`;
  const name = ["href", "value"].find((each) => element.hasAttribute(each));
  return name ? `${element.localName}[${name}="${CSS.escape(element.getAttribute(name))}"]` : ":not(*)";
}

function put(id, html) {
  const element = document.getElementById(id);
  if (!element) return;
  if (shown.get(id) === html) { // a new stream sends everything again
    waiting.delete(id);
    return;
  }
  const active = document.activeElement;
  const holdsFocus = element.contains(active);
  if (holdsFocus && isEdited(active)) {
    waiting.set(id, html);
    return;
  }
  waiting.delete(id);
  const again = holdsFocus && findAgain(active);
  const open = new Set([...element.querySelectorAll("details[open][id]")].map((box) => box.id));
  const checked = new Set([...element.querySelectorAll("input[id]:checked")].map((box) => box.id));
  const scrolled = [...element.querySelectorAll("[id]")].filter((box) => box.scrollLeft || box.scrollTop)
    .map((box) => [box.id, box.scrollLeft, box.scrollTop]);
  element.innerHTML = html;
  shown.set(id, html);
  for (const box of element.querySelectorAll("details[id]")) if (open.has(box.id)) box.open = true;
  for (const box of element.querySelectorAll("input[type=checkbox][id]")) if (checked.has(box.id)) box.checked = true;
  for (const [name, left, top] of scrolled) document.getElementById(name)?.scrollTo(left, top);
  if (again) element.querySelector(again)?.focus({ preventScroll: true });
  tellAges(element);
}

function follow() {
  clearTimeout(retry);
  stream?.close();
  stream = new EventSource(document.body.dataset.stream);
  stream.addEventListener("hello", () => say(""));
  stream.addEventListener("fragment", (event) => {
    const { id, html } = JSON.parse(event.data);
    put(id, html);
  });
  stream.addEventListener("problem", (event) => say(event.data));
  stream.addEventListener("expired", () => location.reload());
  stream.addEventListener("error", () => {
    silence ??= setTimeout(say, 2500, "Reconnecting …"); // a stream ends now and then, and is back within a second
    if (stream.readyState === EventSource.CLOSED) retry = setTimeout(follow, 5000); // the browser does not try again
  });
}

function tellAges(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    const seconds = Math.round((Date.now() - Date.parse(time.dateTime)) / 1000);
    const [size, unit] = Math.abs(seconds) < 60 ? [1, "s"] : Math.abs(seconds) < 3600 ? [60, "min"]
      : Math.abs(seconds) < 86400 ? [3600, "h"] : [86400, "d"];
    const age = `${Math.floor(Math.abs(seconds) / size)} ${unit}`;
    time.dataset.age = seconds < 0 ? `in ${age}` : `${age} ago`;
  }
}

async function sendQuietly(event) {
  const form = event.target;
  if (!form.matches("form[data-quiet]")) return;
  event.preventDefault();
  const body = new URLSearchParams(new FormData(form, event.submitter));
  try {
    const answer = await fetch(form.action, { method: "POST", body, redirect: "manual" });
    const failed = answer.type !== "opaqueredirect" && !answer.ok;
    say(failed ? new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main")?.innerText ?? `HTTP ${answer.status}` : "");
  } catch {
    say("The server did not answer: nothing may have been changed. Try again.");
  }
}

document.addEventListener("submit", sendQuietly);
document.addEventListener("focusout", () => {
  setTimeout(() => {
    for (const [id, html] of [...waiting]) put(id, html);
  });
});
document.addEventListener("visibilitychange", () => {
  if (!document.body.dataset.stream) return;
  if (document.hidden) {
    clearTimeout(retry);
    stream?.close(); // browsers allow six connections per host
  } else follow();
});
if (document.body.dataset.stream && !document.hidden) follow();
tellAges(document);
setInterval(() => tellAges(document), 1000);
