// A worker and a watcher of one job, with the generated client. Usage: node worker.js HOST:PORT
// ../node/worker.js shows TLS, tokens and retries, which a worker between machines needs.
import { strict as assert } from "node:assert";
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { JobState, JobStatusService } from "jobstatus-client/jobstatus/v1/job_status_pb.js";

const address = process.argv[2] ?? "127.0.0.1:50051";
const client = createClient(JobStatusService, createGrpcTransport({ baseUrl: `http://${address}` }));

// Prints each new state of a job until it is done.
async function watch(id: string): Promise<void> {
  let state = JobState.UNSPECIFIED;
  for await (const { event } of client.watchJob({ id })) {
    if (event?.job && event.job.state !== state) {
      state = event.job.state;
      console.log(`watch: ${JobState[state]}`);
    }
  }
}

const { job: created } = await client.createJob({ job: { name: "import customers" } });
assert(created);
const { id } = created;
console.log(`job: ${id}`);
const { job: claimed } = await client.updateJob({ job: { id, state: JobState.IN_PROGRESS }, attempt: 1 });
assert(claimed);
console.log(`claimed: attempt ${claimed.attempt}`);

const watching = watch(id);
for (const progress of [25, 50, 75]) {
  const { job } = await client.updateJob({ job: { id, progress }, attempt: claimed.attempt });
  console.log(`progress: ${job?.progress}`);
}
const result = { steps: 3 };
await client.updateJob({ job: { id, state: JobState.SUCCEEDED, result }, attempt: claimed.attempt });
await watching;

const refusal = await client.getJob({ id: "no-such-job" }).catch((error) => ConnectError.from(error));
assert(refusal instanceof ConnectError && refusal.code === Code.NotFound);
console.log(`unknown job: ${Code[refusal.code]}`);
