// A worker and a watcher of one job. Usage: worker HOST:PORT [SECONDS_PER_STEP]
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <future>
#include <iostream>
#include <iterator>
#include <memory>
#include <random>
#include <regex>
#include <string>
#include <thread>

#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "jobstatus/v1/job_status.grpc.pb.h"

// With it, gRPC retries by itself. `make` writes service_config.json as a literal, R"json({...})json".
constexpr char kServiceConfig[] =
#include "service_config.inc"
    ;

using namespace jobstatus::v1;
using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;
using Stub = JobStatusService::Stub;

// Prints a line with one write, because two threads print.
void Print(const std::string& line) { std::cout << line + "\n" << std::flush; }

// Exits with an error message unless `ok`.
void Check(bool ok, const std::string& otherwise) {
  if (!ok) {
    std::cerr << otherwise << std::endl;
    std::exit(1);
  }
}

// Returns the caller's token, which is sent with each call; empty if the environment has none.
std::string Token() {
  const char* token = std::getenv("JOBSTATUS_TOKEN");
  return token ? token : "";
}

// UNAVAILABLE, DEADLINE_EXCEEDED: the server cannot be reached. CANCELLED: the server was shutting down when the call
// arrived (this program cancels no calls).
bool IsAway(const grpc::Status& status) {
  const grpc::StatusCode code = status.error_code();
  return code == grpc::StatusCode::UNAVAILABLE || code == grpc::StatusCode::DEADLINE_EXCEEDED ||
         code == grpc::StatusCode::CANCELLED;
}

// Retries a call, with backoff and jitter, however long the server is away.
grpc::Status UntilReachable(const std::function<grpc::Status(grpc::ClientContext*)>& attempt) {
  thread_local std::mt19937 random{std::random_device{}()};
  for (double pause = 0.1;; pause = std::min(2 * pause, 10.0)) {
    grpc::ClientContext context;
    if (!Token().empty()) context.AddMetadata("authorization", "Bearer " + Token());
    const auto begun_at = Clock::now();
    const grpc::Status status = attempt(&context);
    if (!IsAway(status)) return status;
    if (Clock::now() - begun_at > Seconds(10)) pause = 0.1;  // reset after a call that ran for long
    std::this_thread::sleep_for(Seconds(std::uniform_real_distribution<>(0, pause)(random)));
  }
}

// Calls a method of the stub, with retries.
template <typename Request, typename Reply>
grpc::Status Call(Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Reply*),
                  const Request& request, Reply* reply) {
  return UntilReachable([&](grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    return (stub.*method)(context, request, reply);
  });
}

// Returns the machine-readable reason of an error, from google.rpc.ErrorInfo.
std::string ReasonOf(const grpc::Status& status) {
  google::rpc::Status details;
  google::rpc::ErrorInfo info;
  details.ParseFromString(status.error_details());
  for (const auto& detail : details.details()) {
    if (detail.UnpackTo(&info)) return info.reason();
  }
  return "none";
}

// Prints each new state of a job until it is done. To resume an interrupted watch, it calls again.
void Watch(Stub& stub, const std::string& id, const std::function<void()>& on_first) {
  JobStatus job;
  const grpc::Status status = UntilReachable([&](grpc::ClientContext* context) {
    WatchJobRequest request;
    request.set_id(id);
    const auto stream = stub.WatchJob(context, request);
    for (WatchJobResponse message; stream->Read(&message);) {
      const JobStatus& newest = message.event().job();
      if (newest.state() != job.state()) Print("watch: " + JobState_Name(newest.state()));
      if (job.id().empty()) on_first();
      job = newest;
    }
    return stream->Finish();
  });
  Check(status.ok(), status.error_message());
  Check(job.done(), "the watch ended with OK before the job was done");
}

std::string NewRequestId() {
  std::random_device random;
  std::string id;
  for (int i = 0; i < 32; ++i) id += "0123456789abcdef"[random() % 16];
  return id;
}

// Returns the contents of the file that a variable of the environment names, or nothing.
std::string FileOf(const char* variable) {
  const char* path = std::getenv(variable);
  std::ifstream file(path ? path : "");
  return {std::istreambuf_iterator<char>(file), {}};
}

// Returns TLS, with the CA and the client's certificate and key (PEM) that the environment names.
std::shared_ptr<grpc::ChannelCredentials> Credentials() {
  if (!std::getenv("JOBSTATUS_CA")) return grpc::InsecureChannelCredentials();
  return grpc::SslCredentials({FileOf("JOBSTATUS_CA"), FileOf("JOBSTATUS_KEY"), FileOf("JOBSTATUS_CERT")});
}

int main(int argc, char** argv) {
  Check(argc > 1, "usage: worker HOST:PORT [SECONDS_PER_STEP]");
  const std::regex loopback(R"((localhost|127(\.\d+){3}|\[::1\]):\d+)");
  Check(Token().empty() || std::getenv("JOBSTATUS_CA") || std::regex_match(argv[1], loopback),
        "a token without TLS is for loopback only: set JOBSTATUS_CA");
  grpc::ChannelArguments arguments;  // keepalive pings detect that the server's machine is down
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetServiceConfigJSON(kServiceConfig);
  const auto channel = grpc::CreateCustomChannel(argv[1], Credentials(), arguments);
  const auto stub = JobStatusService::NewStub(channel);
  const Seconds step_time(argc > 2 ? std::stod(argv[2]) : 0.1);

  // The request_id makes a retry safe: the job is created once.
  CreateJobRequest creation;
  creation.mutable_job()->set_name("import customers");
  creation.mutable_job()->mutable_heartbeat_timeout()->set_seconds(60);
  creation.set_request_id(NewRequestId());
  CreateJobResponse created, again;
  grpc::Status status = Call(*stub, &Stub::CreateJob, creation, &created);
  Check(status.ok(), status.error_message());
  const std::string id = created.job().id();
  Print("job: " + id);
  Print("created: " + JobState_Name(created.job().state()));
  status = Call(*stub, &Stub::CreateJob, creation, &again);
  Check(status.ok() && again.job().id() == id, "a second job was created " + status.error_message());
  Print("created again: the same job");

  // A claim names the attempt that it starts. Later updates name that attempt, so a stale worker cannot write.
  UpdateJobRequest claim;
  UpdateJobResponse reply;
  claim.mutable_job()->set_id(id);
  claim.mutable_job()->set_state(JOB_STATE_IN_PROGRESS);
  claim.set_attempt(1);
  claim.set_request_id(NewRequestId());
  status = Call(*stub, &Stub::UpdateJob, claim, &reply);
  Check(status.ok(), status.error_message());
  const int attempt = reply.job().attempt();
  Print("claimed: " + JobState_Name(reply.job().state()) + ", attempt " + std::to_string(attempt));

  std::promise<void> begun;
  const auto watching = std::async(std::launch::async, [&] { Watch(*stub, id, [&] { begun.set_value(); }); });
  begun.get_future().wait();

  // Of two claims of one attempt, only the first succeeds. This is the second.
  claim.set_request_id(NewRequestId());
  status = Call(*stub, &Stub::UpdateJob, claim, &reply);
  Check(status.error_code() == grpc::StatusCode::FAILED_PRECONDITION, "the second claim succeeded");
  Print("second claim: " + ReasonOf(status));

  UpdateJobRequest update;
  update.set_attempt(attempt);
  update.mutable_job()->set_id(id);
  JobState end = JOB_STATE_SUCCEEDED;
  int step = 0;
  while (step < 3 && end == JOB_STATE_SUCCEEDED) {
    std::this_thread::sleep_for(step_time);  // the work
    update.mutable_job()->set_progress(25 * ++step);
    status = Call(*stub, &Stub::UpdateJob, update, &reply);
    Check(status.ok(), status.error_message());
    Print("progress: " + std::to_string(std::lround(reply.job().progress())));
    if (reply.job().cancel_requested()) end = JOB_STATE_CANCELLED;
  }
  update.mutable_job()->clear_progress();
  update.mutable_job()->set_state(end);
  (*update.mutable_job()->mutable_result()->mutable_fields())["steps"].set_number_value(step);
  status = Call(*stub, &Stub::UpdateJob, update, &reply);
  Check(status.ok(), status.error_message());
  const auto progress = std::to_string(std::lround(reply.job().progress()));
  Print("ended: " + JobState_Name(reply.job().state()) + ", progress " + progress);
  watching.wait();

  GetJobRequest unknown;
  GetJobResponse nothing;
  unknown.set_id("no-such-job");
  status = Call(*stub, &Stub::GetJob, unknown, &nothing);
  Check(status.error_code() == grpc::StatusCode::NOT_FOUND, "an unknown job was found");
  Print("unknown job: " + ReasonOf(status));
}
