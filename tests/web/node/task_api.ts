// A client of the task API: its JobStatus, word for word, and a job from its creation to its end.
// Usage: node task_api.js URL

export interface JobStatus {
  id: string;
  name: string;
  state: "pending" | "in_progress" | "retrying" | "succeeded" | "aborted" | "failed";
  reason?: string;
  hasProgress?: boolean;
  progress?: number;
  createdAt: string;
  updatedAt?: string;
}

const url = process.argv[2]!;

async function send(method: string, path: string, body?: Partial<JobStatus>, headers: Record<string, string> = {}) {
  const init: RequestInit = { method, headers: { "content-type": "application/json", ...headers } };
  if (body !== undefined) init.body = JSON.stringify(body);
  const response = await fetch(url + path, init);
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
  return response;
}

async function* events(path: string): AsyncGenerator<JobStatus> {
  const response = await fetch(url + path, { headers: { accept: "text/event-stream" } });
  let text = "";
  for await (const part of response.body!.pipeThrough(new TextDecoderStream())) {
    text += part;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const data = /^data: (.*)$/m.exec(text.slice(0, end));
      text = text.slice(end + 2);
      if (data) yield JSON.parse(data[1]!) as JobStatus;
    }
  }
}

const created = (await (await send("POST", "/v1/jobs", { name: "report" })).json()) as JobStatus;
const path = `/v1/jobs/${encodeURIComponent(created.id)}`;
const seen: JobStatus[] = [];
for await (const job of events(`${path}/events`)) {
  seen.push(job);
  if (job.state === "pending") await send("PATCH", path, { state: "in_progress", progress: 12.5, reason: "reading" });
  if (job.state === "in_progress") await send("PATCH", path, { state: "succeeded" });
}
const first = await send("GET", path);
const again = await fetch(url + path, { headers: { "if-none-match": first.headers.get("etag")! } });
const listed = (await (await send("GET", "/v1/jobs?state=succeeded&name=report")).json()) as JobStatus[];
console.log(JSON.stringify({ seen, again: again.status, isListed: listed.some((job) => job.id === created.id) }));
