// The board: a table of jobs and a page for each of them, kept current by one stream. It calls the service by the
// Connect protocol, https://connectrpc.com/docs/protocol, as the caller of the login cookie.

const SERVICE = "jobstatus.v1.JobStatusService";
const MAX_ROWS = 2000; // Jobs in the table. Older ones are found by a filter.
const PAGE_SIZE = 1000;
const MIN_UPDATE_INTERVAL = "0.2s"; // Changes of one job within it arrive as one.
const HEARTBEAT_INTERVAL = "10s";
const SILENCE_MS = 25000; // Two heartbeats are missing: the connection is dead.
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10000;
const CLOCK_MS = 5000; // How often ages are written anew.
const STATES = ["pending", "in_progress", "retrying", "succeeded", "failed", "aborted", "cancelled"];
const FINAL_CODES = new Set(["not_found", "permission_denied", "invalid_argument", "failed_precondition"]);
const MAY_CANCEL = new Set(["ROLE_OPERATOR", "ROLE_ADMIN"]);

const $ = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// ---- calls

class CallError extends Error {
  constructor({ code = "unknown", message = "" }) {
    super(message || code);
    this.code = code;
  }
}

async function post(method, body, type, signal) {
  const response = await fetch(`${SERVICE}/${method}`, {
    method: "POST",
    headers: { "Content-Type": type, "Connect-Protocol-Version": "1" },
    body,
    signal,
  });
  if (response.ok) return response;
  const text = await response.text();
  let error = { code: response.status === 401 ? "unauthenticated" : "unavailable", message: `HTTP ${response.status}` };
  try {
    error = { ...error, ...JSON.parse(text) };
  } catch {
    // Not of the service but of a proxy: the status says enough.
  }
  throw new CallError(error);
}

async function call(method, request, signal) {
  return (await post(method, JSON.stringify(request), "application/json", signal)).json();
}

// Yields the messages of a stream; the end of the stream without an error ends the loop.
async function* receive(method, request, signal) {
  const message = new TextEncoder().encode(JSON.stringify(request));
  const envelope = new Uint8Array(5 + message.length);
  new DataView(envelope.buffer).setUint32(1, message.length);
  envelope.set(message, 5);
  const response = await post(method, envelope, "application/connect+json", signal);
  const reader = response.body.getReader();
  let received = new Uint8Array(0);
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new CallError({ code: "unavailable", message: "the connection was cut" });
    const joined = new Uint8Array(received.length + value.length);
    joined.set(received);
    joined.set(value, received.length);
    received = joined;
    while (received.length >= 5) {
      const length = new DataView(received.buffer, received.byteOffset).getUint32(1);
      if (received.length < 5 + length) break;
      const content = JSON.parse(new TextDecoder().decode(received.subarray(5, 5 + length)));
      const isLast = received[0] & 2;
      received = received.subarray(5 + length);
      if (!isLast) yield content;
      else if (content.error) throw new CallError(content.error);
      else return;
    }
  }
}

// ---- the one stream of the page

let following = new AbortController();
let followed = ""; // What the stream is of; empty: there is none.

// Call `open(signal, isAlive)` again and again until it returns true, the page shows something else, or it fails for
// good. `open` calls isAlive() with each message; a silent connection is given up. `what` names the stream: one that is
// open already stays.
async function keepOpen(what, open) {
  if (what === followed) return;
  following.abort();
  followed = what;
  const own = (following = new AbortController());
  let pause = FIRST_PAUSE_MS;
  while (!own.signal.aborted) {
    const attempt = new AbortController();
    const stop = () => attempt.abort();
    own.signal.addEventListener("abort", stop);
    let silence = setTimeout(stop, SILENCE_MS);
    try {
      if (!caller.role) await identify(attempt.signal);
      const isOver = await open(attempt.signal, () => {
        clearTimeout(silence);
        silence = setTimeout(stop, SILENCE_MS);
        pause = FIRST_PAUSE_MS;
        showConnection("live", "live");
      });
      if (isOver) return showConnection("live", "ended");
    } catch (error) {
      if (own.signal.aborted) return;
      if (error.code === "unauthenticated") return logIn();
      if (FINAL_CODES.has(error.code)) {
        showConnection("lost", "stopped");
        return showProblem(error.message);
      }
    } finally {
      clearTimeout(silence);
      attempt.abort();
      own.signal.removeEventListener("abort", stop);
    }
    if (own.signal.aborted) return;
    showConnection("lost", `connection lost, next attempt in ${Math.ceil(pause / 1000)} s`);
    await new Promise((resolve) => setTimeout(resolve, pause * (0.5 + Math.random() / 2)));
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  }
}

function showConnection(kind, text) {
  const shown = $("connection");
  if (shown.textContent === text) return;
  shown.dataset.kind = kind;
  shown.textContent = text;
  if (kind === "live") $("problem").hidden = true;
}

function showProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
}

// ---- words

const stateOf = (job) => (job.state || "").replace("JOB_STATE_", "").toLowerCase();
const wordOf = (state) => state.replace("_", " ");
const titleOf = (job) => job.name || job.id;
const reasonOf = (job) => job.reason || job.error?.message || "";
const eventOf = (event) => (event.type || "").replace("JOB_EVENT_TYPE_", "");
const revisionOf = (job) => Number(job.revision || 0);

function spell(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 100) return `${seconds} s`;
  if (seconds < 100 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 72 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function endOf(job, now) {
  const at = job.projectedCompletion || job.estimatedCompletion;
  if (!at || job.done) return "";
  const left = Date.parse(at) - now;
  return left > 0 ? spell(left) : "overdue";
}

const ageOf = (job, now) => spell(now - Date.parse(job.createdAt));

function marksOf(job) {
  const marks = [];
  if (job.stalled) marks.push(element("span", { className: "mark stalled", textContent: "stalled" }));
  if (job.cancelRequested && !job.done) {
    marks.push(element("span", { className: "mark", textContent: "cancel requested" }));
  }
  return marks;
}

function stateElement(job) {
  const state = stateOf(job);
  const made = element("span", { className: "state", textContent: wordOf(state) });
  made.dataset.state = state;
  return made;
}

function progressElements(job) {
  if (!job.hasProgress && job.progress === undefined) return [];
  const percent = Math.round((job.progress || 0) * 10) / 10;
  const bar = element("progress", { max: 100, value: percent });
  bar.setAttribute("aria-label", "Progress");
  return [bar, element("span", { className: "percent", textContent: `${percent} %` })];
}

// ---- the place: what the address bar says

function placeOf(search) {
  const query = new URLSearchParams(search);
  return {
    job: query.get("job"),
    states: query.getAll("state").filter((state) => STATES.includes(state)),
    stalled: query.get("stalled") === "1",
    labels: query.getAll("label").filter((label) => label.includes("=")),
    name: query.get("name") || "",
    parent: query.get("parent") || "",
    text: query.get("q") || "",
  };
}

function searchOf({ job = null, states = [], stalled = false, labels = [], name = "", parent = "", text = "" }) {
  const query = new URLSearchParams();
  if (job) query.set("job", job);
  for (const state of states) query.append("state", state);
  if (stalled) query.set("stalled", "1");
  for (const label of labels) query.append("label", label);
  if (name) query.set("name", name);
  if (parent) query.set("parent", parent);
  if (text) query.set("q", text);
  return query.size ? `?${query}` : location.pathname;
}

// The filter of the service. States and the text are left to the table, which counts the jobs of each state.
function filterOf(place) {
  const labels = Object.fromEntries(
    place.labels.map((label) => [label.slice(0, label.indexOf("=")), label.slice(label.indexOf("=") + 1)]),
  );
  return { namePrefix: place.name, parentId: place.parent, labels };
}

let place = placeOf(location.search);

function go(search, { replace = false } = {}) {
  history[replace ? "replaceState" : "pushState"](null, "", search);
  show();
}

// ---- the table

const jobs = new Map(); // id -> { job, row, drawn }: `drawn` is the job as the row shows it
const dirty = new Set();
let resumeToken = "";
let listed = ""; // the filter whose jobs are in the table

function newRow(job) {
  const cells = ["", "", "", "Ends in", "Attempt", "Age", ""].map((name) => {
    const cell = element("td");
    cell.setAttribute("role", "cell");
    if (name) cell.dataset.name = name;
    return cell;
  });
  const row = element("tr", {}, ...cells);
  row.setAttribute("role", "row");
  row.dataset.id = job.id;
  return row;
}

function fill(cell, ...children) {
  cell.replaceChildren(...children.filter((child) => child !== ""));
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function drawRow(entry, now) {
  const { job, row, drawn } = entry;
  const [name, state, progress, end, attempt, age, labels] = row.children;
  if (!drawn) {
    const link = element("a", { href: searchOf({ job: job.id }) }, element("bdi", { textContent: titleOf(job) }));
    link.dataset.nav = "";
    fill(name, link, job.name ? element("bdi", { className: "id", textContent: job.id }) : "");
  }
  if (!drawn || ["state", "stalled", "cancelRequested"].some((field) => drawn[field] !== job[field])
    || reasonOf(drawn) !== reasonOf(job)) {
    const reason = reasonOf(job) ? element("bdi", { className: "reason", textContent: reasonOf(job) }) : "";
    fill(state, stateElement(job), ...marksOf(job), reason);
  }
  if (!drawn || drawn.progress !== job.progress || drawn.hasProgress !== job.hasProgress) {
    const [bar, percent] = progress.children;
    const fresh = progressElements(job);
    if (bar && fresh.length) {
      bar.value = fresh[0].value;
      setText(percent, fresh[1].textContent);
    } else fill(progress, ...fresh);
  }
  if (!drawn || JSON.stringify(drawn.labels) !== JSON.stringify(job.labels)) {
    fill(labels, ...Object.entries(job.labels || {}).map(([key, value]) => labelButton(`${key}=${value}`)));
  }
  setText(end, endOf(job, now));
  setText(attempt, job.attempt ? String(job.attempt) : "");
  setText(age, ageOf(job, now));
  row.hidden = !isShown(job);
  entry.drawn = job;
}

function labelButton(label) {
  const button = element("button", { type: "button", className: "label" }, element("bdi", { textContent: label }));
  button.setAttribute("aria-label", `Filter by label ${label}`);
  button.dataset.label = label;
  return button;
}

function isShown(job) {
  if (place.states.length && !place.states.includes(stateOf(job))) return false;
  if (place.stalled && !job.stalled) return false;
  return !place.text || titleOf(job).toLowerCase().includes(place.text.toLowerCase());
}

function put(job) {
  const entry = jobs.get(job.id);
  if (!entry) {
    jobs.set(job.id, { job, row: newRow(job), drawn: null });
  } else if (entry.job.createdAt === job.createdAt && revisionOf(entry.job) > revisionOf(job)) {
    return;
  } else {
    if (entry.job.createdAt !== job.createdAt) entry.drawn = null; // The id was used again.
    entry.job = job;
  }
  changed(job.id);
}

function remove(id) {
  jobs.get(id)?.row.remove();
  jobs.delete(id);
  changed(id);
}

function clearTable() {
  jobs.clear();
  $("rows").replaceChildren();
}

function changed(id) {
  if (!dirty.size) requestAnimationFrame(draw);
  dirty.add(id);
}

function draw() {
  const now = Date.now();
  for (const id of dirty) {
    const entry = jobs.get(id);
    if (!entry) continue;
    const isNew = !entry.row.isConnected;
    drawRow(entry, now);
    if (isNew) insert(entry);
  }
  dirty.clear();
  trim();
  drawCounts();
}

// Newest first, as the service lists them.
function insert({ job, row }) {
  const rows = $("rows").children;
  let low = 0;
  let high = rows.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    const other = jobs.get(rows[middle].dataset.id);
    if (other && other.job.createdAt >= job.createdAt) low = middle + 1;
    else high = middle;
  }
  $("rows").insertBefore(row, rows[low] || null);
}

function trim() {
  const rows = $("rows");
  while (rows.children.length > MAX_ROWS) {
    jobs.delete(rows.lastElementChild.dataset.id);
    rows.lastElementChild.remove();
  }
}

function drawCounts() {
  const counts = Object.fromEntries([...STATES, "stalled"].map((name) => [name, 0]));
  let shown = 0;
  for (const { job } of jobs.values()) {
    counts[stateOf(job)] += 1;
    if (job.stalled) counts.stalled += 1;
    if (isShown(job)) shown += 1;
  }
  for (const button of $("states").querySelectorAll("button")) {
    setText(button.querySelector("b"), String(counts[button.dataset.state]));
    const isPressed = button.dataset.state === "stalled" ? place.stalled : place.states.includes(button.dataset.state);
    button.setAttribute("aria-pressed", String(isPressed));
  }
  const some = jobs.size >= MAX_ROWS ? `the newest ${MAX_ROWS}` : String(jobs.size);
  setText($("summary"), jobs.size ? `${shown} of ${some} jobs` : "No job matches.");
}

function redrawAll() {
  for (const entry of jobs.values()) entry.row.hidden = !isShown(entry.job);
  drawCounts();
}

async function followTable(filter) {
  await keepOpen(`jobs ${listed}`, async (signal, isAlive) => {
    const isFresh = !resumeToken;
    if (isFresh) {
      const pages = await listJobs(filter, signal);
      clearTable();
      pages.jobs.forEach(put);
      resumeToken = pages.resumeToken;
      drawCounts();
    }
    const request = {
      filter, resumeToken, heartbeatInterval: HEARTBEAT_INTERVAL, minUpdateInterval: MIN_UPDATE_INTERVAL,
    };
    try {
      for await (const message of receive("WatchJobs", request, signal)) {
        isAlive();
        for (const event of message.events || []) {
          const kind = eventOf(event);
          if (kind === "RESET") {
            // Snapshots of all jobs follow. The first pages of the list say the newest sooner; a caller who is limited
            // to some jobs gets a RESET after them too.
            resumeToken = "";
            if (!isFresh) return false;
            clearTable();
          } else if (kind === "REMOVED") remove(event.job.id);
          else if (event.job) put(event.job);
        }
        if (message.resumeToken) resumeToken = message.resumeToken;
      }
    } catch (error) {
      if (error.code === "invalid_argument") resumeToken = ""; // The token is of another filter or version.
      else throw error;
    }
    return false;
  });
}

async function listJobs(filter, signal) {
  const found = { jobs: [], resumeToken: "" };
  let pageToken = "";
  do {
    const page = await call("ListJobs", { filter, pageSize: PAGE_SIZE, pageToken }, signal);
    found.jobs.push(...(page.jobs || []));
    found.resumeToken ||= page.resumeToken;
    pageToken = page.nextPageToken;
  } while (pageToken && found.jobs.length < MAX_ROWS);
  return found;
}

function showTable() {
  $("job").hidden = true;
  $("list").hidden = false;
  document.title = "Jobs";
  const form = $("filter").elements;
  for (const [field, text] of [["q", place.text], ["name", place.name], ["parent", place.parent]]) {
    if (document.activeElement !== form[field]) form[field].value = text;
  }
  fill($("chosen"), ...place.labels.map((label) => element("li", {}, chosenLabel(label))));
  const filter = filterOf(place);
  if (JSON.stringify(filter) !== listed) {
    listed = JSON.stringify(filter);
    resumeToken = "";
    clearTable();
    setText($("summary"), "loading");
  }
  redrawAll();
  followTable(filter);
}

function chosenLabel(label) {
  const button = element("button", { type: "button" }, element("bdi", { textContent: label }), " ×");
  button.setAttribute("aria-label", `Remove the filter by label ${label}`);
  button.dataset.unlabel = label;
  return button;
}

// ---- the page of a job

let shownJob = null;
let isNotifying = false;

function showJob(id) {
  $("list").hidden = true;
  $("job").hidden = false;
  shownJob = null;
  isNotifying = false;
  $("notify").setAttribute("aria-pressed", "false");
  fill($("job-name"), element("bdi", { textContent: id }));
  for (const part of ["job-state", "job-fields", "history", "children"]) $(part).replaceChildren();
  for (const part of ["job-error", "job-result", "children-section", "cancel", "delete"]) {
    $(part).hidden = true;
  }
  $("all-children").href = searchOf({ parent: id });
  $("follow").textContent = linesToFollow(id);
  document.title = `${id} - Jobs`;
  $("job-name").focus();
  keepOpen(`job ${id}`, async (signal, isAlive) => {
    const request = { id, heartbeatInterval: HEARTBEAT_INTERVAL, minUpdateInterval: MIN_UPDATE_INTERVAL };
    for await (const message of receive("WatchJob", request, signal)) {
      isAlive();
      const { job } = message.event;
      if (eventOf(message.event) === "REMOVED") return showDeleted();
      if (job) await drawJob(job, signal);
    }
    return Boolean(shownJob?.done);
  });
}

function showDeleted() {
  showProblem("The job was deleted.");
  $("cancel").hidden = $("delete").hidden = true;
  return true;
}

function linesToFollow(id) {
  const listening = document.querySelector('meta[name="grpc-address"]').content;
  // The server may listen on all addresses of its machine: the page's own host is one of them.
  const address = listening.replace(/^(?!unix:).*(?=:\d+$)/, location.hostname);
  const isUnix = address.startsWith("unix:");
  // --tls-cert is for the page and for gRPC, but not for Unix sockets.
  const isTls = !isUnix && location.protocol === "https:";
  // An id has no character that a shell reads; a first `-` would be read as a flag.
  const word = id.startsWith("-") ? `-- ${id}` : id;
  const options = isTls ? "" : isUnix ? "-plaintext -unix " : "-plaintext ";
  return (
    `jobstatus watch --address ${isTls ? "grpcs://" : ""}${address} ${word}\n` +
    `grpcurl ${options}-d '${JSON.stringify({ id })}' ${address.replace(/^unix:/, "")} ${SERVICE}/WatchJob`
  );
}

async function drawJob(job, signal) {
  const before = shownJob;
  shownJob = job;
  const title = titleOf(job);
  fill($("job-name"), element("bdi", { textContent: title }));
  document.title = `${title} - Jobs`;
  fill($("job-state"), stateElement(job), ...marksOf(job), " ", ...progressElements(job));
  fill($("job-fields"), ...fieldElements(job, Date.now()));
  showText("job-error", textOfError(job.error));
  showText("job-result", job.result && JSON.stringify(job.result, null, 2));
  const mayCancel = MAY_CANCEL.has(caller.role);
  $("cancel").hidden = !mayCancel || Boolean(job.done);
  $("delete").hidden = !mayCancel || !job.done;
  $("notify").hidden = Boolean(job.done) || !("Notification" in window);
  if (job.done && before && !before.done && isNotifying) {
    new Notification(title, { body: `${wordOf(stateOf(job))} ${reasonOf(job)}`, tag: job.id });
  }
  if (!before || stateOf(before) !== stateOf(job) || before.attempt !== job.attempt || before.stalled !== job.stalled) {
    await Promise.all([drawHistory(job.id, signal), drawChildren(job.id, signal)]);
  }
}

function fieldElements(job, now) {
  const at = (instant) => instant && `${new Date(instant).toLocaleString()} (${spell(now - Date.parse(instant))} ago)`;
  const texts = {
    Id: job.id,
    Reason: job.reason,
    "Cancel reason": job.cancelReason,
    Attempt: job.attempt,
    Created: at(job.createdAt),
    Started: at(job.startedAt),
    Updated: at(job.updatedAt),
    Finished: at(job.finishedAt),
    "Ends in": endOf(job, now),
    "Heartbeat timeout": job.heartbeatTimeout,
    "Last heartbeat": at(job.lastHeartbeatAt),
    Revision: job.revision,
  };
  const fields = Object.entries(texts)
    .filter(([, text]) => text)
    .map(([name, text]) => [name, [element("bdi", { textContent: text })]]);
  if (job.parentId) fields.push(["Parent", [jobLink(job.parentId, job.parentId)]]);
  const labels = Object.entries(job.labels || {}).map(([key, value]) => labelButton(`${key}=${value}`));
  if (labels.length) fields.push(["Labels", labels]);
  return fields.flatMap(([name, content]) => [
    element("dt", { textContent: name }),
    element("dd", {}, ...content),
  ]);
}

function textOfError(error) {
  if (!error) return "";
  return [error.message, error.reason && `reason: ${error.reason}`, `code: ${error.code}`].filter(Boolean).join("\n");
}

function showText(id, text) {
  $(id).hidden = !text;
  setText($(id).querySelector("pre"), text || "");
}

function jobLink(id, text) {
  const link = element("a", { href: searchOf({ job: id }) }, element("bdi", { textContent: text }));
  link.dataset.nav = "";
  return link;
}

async function drawHistory(id, signal) {
  const entries = [];
  let pageToken = "";
  do {
    const page = await call("ListJobTransitions", { id, pageSize: 1000, pageToken }, signal);
    entries.push(...(page.transitions || []));
    pageToken = page.nextPageToken;
  } while (pageToken);
  fill($("history"), ...entries.map(historyEntry));
}

function historyEntry(entry) {
  const [from, to] = [entry.fromState, entry.toState].map((state) => stateOf({ state }));
  const attempt = entry.attempt ? `, attempt ${entry.attempt}` : "";
  const colon = entry.reason ? ": " : " ";
  const moment = new Date(entry.transitionedAt);
  const time = element("time", { dateTime: entry.transitionedAt, textContent: moment.toLocaleString() });
  const actor = element("bdi", { className: "actor", textContent: entry.actor || "" });
  const move = element("b", { textContent: from && from !== to ? `${wordOf(from)} → ${wordOf(to)}` : wordOf(to) });
  const reason = element("bdi", { textContent: entry.reason || "" });
  return element("li", {}, time, " ", move, attempt + colon, reason, " ", actor);
}

async function drawChildren(parentId, signal) {
  const page = await call("ListJobs", { filter: { parentId }, pageSize: 100 }, signal);
  const children = page.jobs || [];
  $("children-section").hidden = !children.length;
  const line = (job) => element("li", {}, jobLink(job.id, titleOf(job)), " ", stateElement(job), ...marksOf(job));
  fill($("children"), ...children.map(line));
}

// ---- what the caller may do

let caller = {};

async function identify(signal) {
  const { identity = {} } = await call("GetCallerIdentity", {}, signal);
  caller = identity;
  $("logout").hidden = !identity.authenticated;
  const role = (identity.role || "").replace("ROLE_", "").toLowerCase();
  setText($("caller"), identity.authenticated ? `${identity.principal}, ${role} in ${identity.tenant}` : "");
}

function logIn() {
  forget();
  showConnection("lost", "not logged in");
  $("logout").hidden = true;
  if (!$("login").open) $("login").showModal();
}

// The next stream is of another caller, who may see other jobs.
function forget() {
  following.abort();
  followed = listed = resumeToken = "";
  caller = {};
}

async function confirmed(title, text, yes) {
  setText($("confirm-title"), title);
  setText($("confirm-text"), text);
  setText($("confirm-yes"), yes);
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
  return dialog.returnValue === "yes";
}

async function guarded(action) {
  $("problem").hidden = true;
  try {
    await action();
  } catch (error) {
    if (error.code === "unauthenticated") logIn();
    else showProblem(error.message);
  }
}

// ---- events

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-nav]");
  const button = event.target.closest("button[data-label], button[data-unlabel], #states button");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
    event.preventDefault();
    go(link.getAttribute("href"));
  } else if (button?.dataset.label) {
    go(searchOf({ ...place, job: null, labels: [...new Set([...place.labels, button.dataset.label])] }));
  } else if (button?.dataset.unlabel) {
    go(searchOf({ ...place, labels: place.labels.filter((label) => label !== button.dataset.unlabel) }));
  } else if (button?.dataset.state === "stalled") {
    go(searchOf({ ...place, stalled: !place.stalled }));
  } else if (button?.dataset.state) {
    const { state } = button.dataset;
    const others = place.states.filter((each) => each !== state);
    const states = others.length < place.states.length ? others : [...place.states, state];
    go(searchOf({ ...place, states }));
  }
});

function readFilter({ replace }) {
  const form = $("filter").elements;
  const label = form.label.value.trim();
  const labels = label.includes("=") && !place.labels.includes(label) ? [...place.labels, label] : place.labels;
  if (label.includes("=")) form.label.value = "";
  go(
    searchOf({ ...place, labels, text: form.q.value, name: form.name.value, parent: form.parent.value.trim() }),
    { replace },
  );
}

$("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  readFilter({ replace: false });
});
$("filter").addEventListener("change", () => readFilter({ replace: false }));
$("filter").elements.q.addEventListener("input", () => {
  place.text = $("filter").elements.q.value;
  redrawAll();
});

$("cancel").addEventListener("click", () =>
  guarded(async () => {
    const { id } = shownJob;
    const text = "The worker is asked to stop. A job that no worker has started is cancelled at once.";
    if (await confirmed(`Cancel ${titleOf(shownJob)}?`, text, "Cancel the job")) await call("CancelJob", { id });
  }),
);
$("delete").addEventListener("click", () =>
  guarded(async () => {
    const { id } = shownJob;
    const text = "Its status and its history are removed for good.";
    if (await confirmed(`Delete ${titleOf(shownJob)}?`, text, "Delete the job")) {
      await call("DeleteJob", { id });
      go(searchOf({}));
    }
  }),
);
$("notify").addEventListener("click", async () => {
  const isGranted = (await Notification.requestPermission()) === "granted";
  isNotifying = isGranted && !isNotifying;
  $("notify").setAttribute("aria-pressed", String(isNotifying));
  if (!isGranted) showProblem("The browser does not allow notifications of this page.");
});

$("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { token } = $("login-form").elements;
  const response = await fetch("login", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ token: token.value.trim() }),
  });
  token.value = "";
  if (!response.ok) {
    setText($("login-problem"), response.status === 401 ? "This token is not valid." : `HTTP ${response.status}`);
    return;
  }
  setText($("login-problem"), "");
  $("login").close();
  show();
});
$("login").addEventListener("cancel", (event) => event.preventDefault());
$("logout").addEventListener("click", async () => {
  await fetch("logout", { method: "POST" });
  forget();
  show();
});

window.addEventListener("popstate", show);
setInterval(() => {
  if ($("list").hidden) return;
  const now = Date.now();
  for (const { job, row } of jobs.values()) {
    if (row.hidden || !row.isConnected) continue;
    setText(row.children[3], endOf(job, now));
    setText(row.children[5], ageOf(job, now));
  }
}, CLOCK_MS);

for (const state of [...STATES, "stalled"]) {
  const button = element("button", { type: "button" }, `${wordOf(state)} `, element("b", { textContent: "0" }));
  button.dataset.state = state;
  $("states").append(button);
}

function show() {
  place = placeOf(location.search);
  $("problem").hidden = true;
  if (place.job) showJob(place.job);
  else showTable();
}

show();
