// A client of the content queue: its JobStatus, word for word, polled until the end.
// Usage: node content_queue.js URL

export interface JobStatus {
  id: string;
  status: "queued" | "processing" | "completed" | "failed" | "cancelled";
  progress?: number;
  estimatedCompletion?: string;
  error?: string;
}

const url = process.argv[2]!;
const headers = { "content-type": "application/json", accept: "application/json; profile=content" };

async function write(method: "POST" | "PATCH", path: string, body: Partial<JobStatus>): Promise<JobStatus> {
  const response = await fetch(url + path, { method, headers, body: JSON.stringify(body) });
  if (!response.ok) throw new Error(`${response.status} ${await response.text()}`);
  return (await response.json()) as JobStatus;
}

const job = await write("POST", "/v1/jobs", {});
const path = `/v1/jobs/${encodeURIComponent(job.id)}`;
const estimatedCompletion = "2030-01-31T12:00:00Z";
const work = (async () => {
  await write("PATCH", path, { status: "processing", progress: 50, estimatedCompletion });
  await write("PATCH", path, { status: "failed", error: "out of disk" });
})();

const seen: JobStatus[] = [job];
let etag = "";
while (!["completed", "failed", "cancelled"].includes(seen.at(-1)!.status)) {
  const response = await fetch(url + path, { headers: { ...headers, "if-none-match": etag, prefer: "wait=10" } });
  etag = response.headers.get("etag")!;
  if (response.status === 200) seen.push((await response.json()) as JobStatus);
}
await work;
console.log(JSON.stringify(seen));
