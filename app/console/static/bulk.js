// Sends the form of a bulk action again and again, until nothing is left, it fails, or the operator stops it.
// The answer to each is the page with the progress. Without this file, the operator sends each form.

const stop = document.getElementById("stop");
let isStopped = false;

function offer() {
  const all = document.querySelector("#bulk-form button[name=all]");
  if (all) all.hidden = false;
}

async function send(form) {
  const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
  return new DOMParser().parseFromString(await answer.text(), "text/html");
}

async function sendAll() {
  let form;
  isStopped = false;
  stop.hidden = false;
  while (!isStopped && (form = document.querySelector("#bulk-form form"))) {
    for (const button of form.querySelectorAll("button")) button.disabled = true;
    stop.focus();
    const page = await send(form);
    if (!page.getElementById("bulk-form")) return document.querySelector("main").replaceWith(page.querySelector("main"));
    for (const id of ["bulk-state", "bulk-form"]) {
      document.getElementById(id).replaceChildren(...page.getElementById(id).childNodes);
    }
  }
  stop.hidden = true;
  document.querySelector("main").focus();
  offer();
}

document.addEventListener("submit", (event) => {
  if (event.submitter?.name !== "all") return;
  event.preventDefault();
  sendAll().catch(() => document.getElementById("bulk-state").append("The server did not answer. Load the page again."));
});
stop.addEventListener("click", () => { isStopped = true; });
offer();
