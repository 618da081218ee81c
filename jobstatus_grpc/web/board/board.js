// The board: a table of jobs and a page for each of them, kept current by one stream. It calls the service by the
// Connect protocol, https://connectrpc.com/docs/protocol, as the caller of the login cookie.

const SERVICE = "jobstatus.v1.JobStatusService";
const MAX_ROWS = 2000; // Jobs in the table. Older ones are found by a filter.
const PAGE_SIZE = 500;
const MIN_UPDATE_INTERVAL = "0.2s"; // Changes of one job within it arrive as one.
const HEARTBEAT_INTERVAL = "10s";
const SILENCE_MS = 25000; // Two heartbeats are missing: the connection is dead.
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 10000;
const CLOCK_MS = 5000; // How often ages are written anew.
const MAX_CLOCK_ERROR_MS = 1000; // Above it they are written anew at once.
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
  constructor({ code = "unknown", message = "", details = [] }) {
    super(message || code);
    this.code = code;
    const debugOf = (name) => details.find(({ type }) => type === `google.rpc.${name}`)?.debug;
    // Time until the caller, who is over its rate of calls, has its next turn; 0: the error is another one.
    const isOverRate = debugOf("ErrorInfo")?.reason === "TOO_MANY_REQUESTS";
    this.turnMs = isOverRate ? 1000 * parseFloat(debugOf("RetryInfo")?.retryDelay ?? "1") : 0;
  }
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Make one call; where the caller is over its rate, again after the time that the service asks for, and it alone.
async function inTurn(makeCall, signal) {
  for (;;) {
    try {
      return await makeCall();
    } catch (error) {
      if (!error.turnMs) throw error;
      await sleep(error.turnMs);
      signal?.throwIfAborted();
    }
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
  const send = () => post(method, JSON.stringify(request), "application/json", signal);
  const response = await (await inTurn(send, signal)).json();
  signal?.throwIfAborted(); // The page may show something else by now.
  return response;
}

// Yields the messages of a stream; the end of the stream without an error ends the loop.
async function* receive(method, request, signal) {
  let messages;
  const first = await inTurn(() => (messages = messagesOf(method, request, signal)).next(), signal);
  if (first.done) return;
  yield first.value;
  yield* messages;
}

async function* messagesOf(method, request, signal) {
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
      if (content.serverTime) setClock(content.serverTime);
      if (!isLast) yield content;
      else if (content.error) throw new CallError(content.error);
      else return;
    }
  }
}

// ---- the one stream of the page

let following = new AbortController();
let followed = ""; // What the stream is of; empty: there is none.

// Call `open(signal, { isAlive, isCurrent })` again and again until it returns true, the page shows something else, or
// it fails for good. `open` calls isAlive() with each response, and isCurrent() with each message of the stream; a
// silent connection is given up. `what` names the stream: one that is open already stays.
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
    let silence;
    const isAlive = () => {
      clearTimeout(silence);
      silence = setTimeout(stop, SILENCE_MS);
    };
    const isCurrent = () => {
      isAlive();
      pause = FIRST_PAUSE_MS;
      showConnection("live", "live");
    };
    let why = "connection lost";
    try {
      isAlive();
      await identify(attempt.signal); // Another tab may have logged in as another caller.
      if (await open(attempt.signal, { isAlive, isCurrent })) return showConnection("live", "ended");
    } catch (error) {
      if (own.signal.aborted) return;
      if (error.code === "unauthenticated") return logIn();
      if (FINAL_CODES.has(error.code)) {
        followed = "";
        showConnection("lost", "stopped");
        return showProblem(error.message);
      }
      if (error instanceof CallError && error.code !== "unavailable") why = error.message;
    } finally {
      clearTimeout(silence);
      attempt.abort();
      own.signal.removeEventListener("abort", stop);
    }
    if (own.signal.aborted) return;
    showConnection("lost", `${why}, next attempt in ${Math.ceil(pause / 1000)} s`);
    await sleep(pause * (0.5 + Math.random() / 2));
    pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
  }
}

function showConnection(kind, text) {
  const shown = $("connection");
  if (shown.textContent === text) return;
  shown.dataset.kind = kind;
  shown.textContent = text;
  if (kind === "live") $("problem").hidden = true;
  else if (!isLoaded) setText($("summary"), "");
}

function showProblem(text) {
  $("problem").textContent = text;
  $("problem").hidden = false;
}

// ---- the clock of the server, from which all times of jobs are

let clockAheadMs = 0; // of the browser's clock

const serverNow = () => Date.now() + clockAheadMs;

function setClock(serverTime) {
  const before = clockAheadMs;
  clockAheadMs = Date.parse(serverTime) - Date.now();
  if (Math.abs(clockAheadMs - before) > MAX_CLOCK_ERROR_MS) drawTimes();
}

function drawTimes() {
  if (!$("job").hidden && shownJob) drawFields(shownJob);
  if ($("list").hidden) return;
  const now = serverNow();
  for (const { job, row } of jobs.values()) {
    if (row.hidden || !row.isConnected) continue;
    setText(row.children[3], endOf(job, now));
    setText(row.children[5], ageOf(job, now));
  }
}

// ---- words

const stateOf = (job) => (job.state || "").replace("JOB_STATE_", "").toLowerCase();
const wordOf = (state) => state.replace("_", " ");
const titleOf = (job) => job.name || job.id;
const reasonOf = (job) => job.reason || job.error?.message || "";
const eventOf = (event) => (event.type || "").replace("JOB_EVENT_TYPE_", "");
const revisionOf = (job) => Number(job.revision || 0);
const labelsOf = (job) => Object.entries(job.labels || {}).map(([key, value]) => `${key}=${value}`);
// Times of creation as text in the order of time; with the Z, which some have after fewer digits, they are not.
const createdOf = (job) => job.createdAt.replace("Z", "");

function spell(milliseconds) {
  const seconds = Math.max(0, Math.round(milliseconds / 1000));
  if (seconds < 100) return `${seconds} s`;
  if (seconds < 100 * 60) return `${Math.round(seconds / 60)} min`;
  if (seconds < 72 * 3600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function endOf(job, now) {
  const at = job.estimatedCompletion || job.projectedCompletion; // As `jobstatus list` has it.
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

const percentOf = (progress) => `${Math.round((progress || 0) * 10) / 10} %`;

function progressElements(job) {
  if (!job.hasProgress && job.progress === undefined) return [];
  const bar = element("progress", { max: 100, value: Math.round((job.progress || 0) * 10) / 10 });
  bar.setAttribute("aria-label", "Progress");
  return [bar, element("span", { className: "percent", textContent: percentOf(job.progress) })];
}

// ---- the place: what the address bar says

const partsOf = (label) => [label.slice(0, label.indexOf("=")), label.slice(label.indexOf("=") + 1)];

function placeOf(search) {
  const query = new URLSearchParams(search);
  const labels = query.getAll("label").filter((label) => label.includes("="));
  return {
    job: query.get("job"),
    states: query.getAll("state").filter((state) => STATES.includes(state)),
    stalled: query.get("stalled") === "1",
    // A job has one value for each key: the last one chosen counts.
    labels: [...new Map(labels.map((label) => [partsOf(label)[0], label])).values()],
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
  return String(query) ? `?${query}` : location.pathname;
}

// The filter of the service. States and the text are left to the table, which counts the jobs of each state.
function filterOf(place) {
  return { namePrefix: place.name, parentId: place.parent, labels: Object.fromEntries(place.labels.map(partsOf)) };
}

let place = placeOf(location.search);

function go(search) {
  if (new URL(search, location).href !== location.href) history.pushState(null, "", search);
  show();
}

// ---- the table

const jobs = new Map(); // id -> { job, row, drawn }: `drawn` is the job as the row shows it
const dirty = new Set();
let resumeToken = "";
let listed = ""; // the filter whose jobs are in the table
let isLoaded = false; // whether they have arrived

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
    fill(labels, ...labelsOf(job).map(labelButton));
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
  if (jobs.has(job.id) && jobs.get(job.id).job.createdAt !== job.createdAt) remove(job.id); // The id was used again.
  const entry = jobs.get(job.id);
  if (!entry) jobs.set(job.id, { job, row: newRow(job), drawn: null });
  else if (revisionOf(entry.job) <= revisionOf(job)) entry.job = job;
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

let frame = 0; // That of the next draw; 0: none is due.

function changed(id) {
  dirty.add(id);
  // A page in the background gets no frames, and must not collect jobs without end.
  if (dirty.size > MAX_ROWS) draw();
  else frame ||= requestAnimationFrame(draw);
}

function draw() {
  cancelAnimationFrame(frame);
  frame = 0;
  const now = serverNow();
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
    if (other && createdOf(other.job) >= createdOf(job)) low = middle + 1;
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
  if (!isLoaded) return;
  const some = jobs.size >= MAX_ROWS ? `the newest ${MAX_ROWS}` : String(jobs.size);
  setText($("summary"), jobs.size ? `${shown} of ${some} jobs` : "No job matches.");
}

function redrawAll() {
  for (const entry of jobs.values()) entry.row.hidden = !isShown(entry.job);
  drawCounts();
}

async function followTable(filter) {
  await keepOpen(`jobs ${listed}`, async (signal, { isAlive, isCurrent }) => {
    const isFresh = !resumeToken;
    if (!isLoaded) setText($("summary"), "loading…");
    if (isFresh) {
      const pages = await listJobs(filter, signal, isAlive);
      clearTable();
      pages.jobs.forEach(put);
      resumeToken = pages.resumeToken;
      isLoaded = true;
      drawCounts();
    }
    const request = {
      filter, resumeToken, heartbeatInterval: HEARTBEAT_INTERVAL, minUpdateInterval: MIN_UPDATE_INTERVAL,
    };
    try {
      for await (const message of receive("WatchJobs", request, signal)) {
        isCurrent();
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
      // The token is of another caller or version. A new one is refused for another reason.
      if (error.code === "invalid_argument" && !isFresh) resumeToken = "";
      else throw error;
    }
    return false;
  });
}

async function listJobs(filter, signal, isAlive) {
  const found = { jobs: [], resumeToken: "" };
  let pageToken = "";
  do {
    const page = await call("ListJobs", { filter, pageSize: PAGE_SIZE, pageToken }, signal);
    isAlive();
    found.jobs.push(...(page.jobs || []));
    found.resumeToken ||= page.resumeToken;
    pageToken = page.nextPageToken;
  } while (pageToken && found.jobs.length < MAX_ROWS);
  return found;
}

function showTable() {
  $("problem").hidden = true;
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
    isLoaded = false;
    setText($("summary"), "loading…");
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
let historyDrawn = ""; // What of the job its history is drawn for.
let childrenDrawn = ""; // What of the job the list of its children is drawn for.

function showJob(id) {
  if (followed === `job ${id}`) return; // It is shown already: the address has another #fragment.
  $("problem").hidden = true;
  $("list").hidden = true;
  $("job").hidden = false;
  shownJob = null;
  isNotifying = false;
  historyDrawn = childrenDrawn = "";
  $("notify").setAttribute("aria-pressed", "false");
  fill($("job-name"), element("bdi", { textContent: id }));
  for (const part of ["job-state", "job-fields", "history", "children"]) $(part).replaceChildren();
  for (const part of ["job-error", "job-result", "children-section", "follow-section", "cancel", "delete"]) {
    $(part).hidden = true;
  }
  $("all-children").href = searchOf({ parent: id });
  document.title = `${id} - Jobs`;
  $("job-name").focus();
  keepOpen(`job ${id}`, async (signal, { isCurrent }) => {
    const request = { id, heartbeatInterval: HEARTBEAT_INTERVAL, minUpdateInterval: MIN_UPDATE_INTERVAL };
    for await (const message of receive("WatchJob", request, signal)) {
      isCurrent();
      const { job } = message.event;
      if (eventOf(message.event) === "REMOVED") return showDeleted();
      if (job) await drawJob(job, signal);
    }
    return Boolean(shownJob?.done);
  });
}

function showDeleted() {
  showConnection("live", "ended"); // First, because it hides problems.
  showProblem("The job was deleted.");
  $("cancel").hidden = $("delete").hidden = true;
  return true;
}

// Only of a job that the service has: an id in an address may have characters that a shell reads.
function linesToFollow(id) {
  const [, scheme, listening] = /^(grpcs:\/\/)?(.*)$/.exec(document.querySelector('meta[name="grpc-address"]').content);
  // The server may listen on all addresses of its machine: the page's own host is one of them.
  const address = listening.replace(/^(?!unix:).*(?=:\d+$)/, location.hostname);
  const word = id.startsWith("-") ? `-- ${id}` : id; // Else it is read as a flag.
  const plain = scheme ? "" : address.startsWith("unix:") ? "-plaintext -unix " : "-plaintext ";
  const token = caller.authenticated ? '-H "authorization: Bearer $JOBSTATUS_TOKEN" ' : "";
  const place = address.replace(/^unix:/, "");
  return [
    `jobstatus watch --address ${scheme || ""}${address} ${word}`,
    `grpcurl ${plain}${token}-d '${JSON.stringify({ id })}' ${place} ${SERVICE}/WatchJob`,
  ].join("\n");
}

async function drawJob(job, signal) {
  const before = shownJob;
  shownJob = job;
  const title = titleOf(job);
  fill($("job-name"), element("bdi", { textContent: title }));
  document.title = `${title} - Jobs`;
  fill($("job-state"), stateElement(job), ...marksOf(job), " ", ...progressElements(job));
  drawFields(job);
  showText("job-error", textOfError(job.error));
  showText("job-result", job.result && JSON.stringify(job.result, null, 2));
  const mayCancel = MAY_CANCEL.has(caller.role);
  $("cancel").hidden = !mayCancel || Boolean(job.done);
  $("delete").hidden = !mayCancel || !job.done;
  $("notify").hidden = Boolean(job.done) || !("Notification" in window);
  $("follow-section").hidden = false;
  setText($("follow"), linesToFollow(job.id));
  if (job.done && before && !before.done && isNotifying) notify(job);
  // What makes an entry of the history.
  const recorded = [stateOf(job), job.attempt, job.stalled, job.cancelRequested].join();
  if (recorded !== historyDrawn) {
    await drawHistory(job.id, signal);
    historyDrawn = recorded;
  }
  // The service sends the job after changes of its children. The stream waits: one list is read at a time.
  const numbers = `${textOfChildren(job)} ${job.childrenProgress}`;
  if (numbers !== childrenDrawn) {
    await drawChildren(job.id, signal);
    childrenDrawn = numbers;
  }
}

function textOfChildren(job) {
  const counts = STATES.filter((word) => job.children?.[word]).map((word) => `${job.children[word]} ${wordOf(word)}`);
  return counts.length ? `${counts.join(", ")} (${percentOf(job.childrenProgress)})` : "";
}

function notify(job) {
  try {
    new Notification(titleOf(job), { body: `${wordOf(stateOf(job))} ${reasonOf(job)}`, tag: job.id });
  } catch {
    showProblem("This browser has no notifications for pages."); // Chrome on Android: for service workers only.
  }
}

function drawFields(job) {
  const now = serverNow();
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
    Children: textOfChildren(job),
    "Heartbeat timeout": job.heartbeatTimeout,
    "Last heartbeat": at(job.lastHeartbeatAt),
    Revision: job.revision,
  };
  for (const [name, text] of Object.entries(texts)) {
    drawField(name, text, () => [element("bdi", { textContent: text })]);
  }
  drawField("Parent", job.parentId, () => [jobLink(job.parentId, job.parentId)]);
  drawField("Labels", labelsOf(job).join("\n"), () => labelsOf(job).map(labelButton));
}

// Draw a field anew only where its text is another one: a link or button that is replaced loses the focus, and a click.
function drawField(name, text, contentOf) {
  let field = $("job-fields").querySelector(`[data-name="${name}"]`);
  if (!field) {
    field = element("div", {}, element("dt", { textContent: name }), element("dd"));
    field.dataset.name = name;
    $("job-fields").append(field);
  }
  field.hidden = !text;
  if (!text || field.dataset.text === String(text)) return;
  field.dataset.text = text;
  fill(field.lastElementChild, ...contentOf());
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
  const line = (job) => {
    const progress = job.done ? [] : progressElements(job);
    return element("li", {}, jobLink(job.id, titleOf(job)), " ", stateElement(job), ...marksOf(job), " ", ...progress);
  };
  const focused = document.activeElement.closest("#children a")?.getAttribute("href");
  fill($("children"), ...children.map(line));
  if (focused) [...$("children").querySelectorAll("a")].find((link) => link.getAttribute("href") === focused)?.focus();
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
  $("list").hidden = $("job").hidden = true;
  clearTable();
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

async function confirmed(title, text, yes, { offersChildren = false } = {}) {
  setText($("confirm-title"), title);
  setText($("confirm-text"), text);
  setText($("confirm-yes"), yes);
  $("confirm-children").hidden = !offersChildren;
  $("cascade").checked = false;
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
    go(searchOf({ ...place, job: null, labels: [...place.labels, button.dataset.label] }));
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

function readFilter() {
  const form = $("filter").elements;
  const label = form.label.value.trim();
  const labels = label.includes("=") ? [...place.labels, label] : place.labels;
  if (label.includes("=")) form.label.value = "";
  go(searchOf({ ...place, labels, text: form.q.value, name: form.name.value, parent: form.parent.value.trim() }));
}

$("filter").addEventListener("submit", (event) => {
  event.preventDefault();
  readFilter();
});
$("filter").addEventListener("change", readFilter);
$("filter").elements.q.addEventListener("input", () => {
  place.text = $("filter").elements.q.value;
  redrawAll();
});

$("cancel").addEventListener("click", () =>
  guarded(async () => {
    const { id } = shownJob;
    const text = "The worker is asked to stop. A job that no worker has started is cancelled at once.";
    const offersChildren = Boolean(textOfChildren(shownJob));
    if (await confirmed(`Cancel ${titleOf(shownJob)}?`, text, "Cancel the job", { offersChildren })) {
      await call("CancelJob", { id, cascade: $("cascade").checked });
    }
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
  const problem = await sendToken(token.value.trim());
  setText($("login-problem"), problem);
  if (problem) return;
  token.value = "";
  tabs.postMessage("login");
  $("login").close();
});
// Closed by Escape, it opens again: the next call is refused.
$("login").addEventListener("close", show);

async function sendToken(token) {
  const headers = { "Content-Type": "application/json" };
  try {
    const { ok, status } = await fetch("login", { method: "POST", headers, body: JSON.stringify({ token }) });
    if (ok) return "";
    return status === 400 || status === 401 ? "This token is not valid." : `HTTP ${status}`;
  } catch {
    return "The server cannot be reached.";
  }
}

$("logout").addEventListener("click", () =>
  guarded(async () => {
    const { ok, status } = await fetch("logout", { method: "POST" });
    if (!ok) throw new CallError({ message: `HTTP ${status}` });
    tabs.postMessage("logout");
    forget();
    show();
  }),
);

// The cookie is that of all tabs.
const tabs = new BroadcastChannel("login");
tabs.addEventListener("message", () => {
  forget();
  if ($("login").open) $("login").close();
  else show();
});

window.addEventListener("popstate", show);
setInterval(drawTimes, CLOCK_MS);

for (const state of [...STATES, "stalled"]) {
  const button = element("button", { type: "button" }, `${wordOf(state)} `, element("b", { textContent: "0" }));
  button.dataset.state = state;
  $("states").append(button);
}

function show() {
  place = placeOf(location.search);
  if (place.job) showJob(place.job);
  else showTable();
}

show();
