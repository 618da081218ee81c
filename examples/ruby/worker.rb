# A worker and a watcher of one job. Usage: ruby -I GENERATED worker.rb HOST:PORT [SECONDS_PER_STEP]
require 'google/protobuf/well_known_types'
require 'google/rpc/error_details_pb'
require 'grpc'
require 'jobstatus/v1/job_status_services_pb'
require 'securerandom'

V1 = JobStatus::V1
$stdout.sync = true

# Unavailable, DeadlineExceeded: the server cannot be reached. Cancelled: the server was shutting down when the call
# arrived (this program cancels no calls).
AWAY = [GRPC::Unavailable, GRPC::DeadlineExceeded, GRPC::Cancelled].freeze

# Retries a call, with backoff and jitter, however long the server is away.
def until_reachable
  pause = 0.1
  begin
    begun_at = Time.now
    yield
  rescue *AWAY
    pause = Time.now - begun_at > 10 ? 0.1 : [2 * pause, 10].min # reset after a call that ran for long
    sleep(rand * pause)
    retry
  end
end

# The caller's token, which is sent with each call.
TOKEN = ENV.fetch('JOBSTATUS_TOKEN', '')
METADATA = TOKEN.empty? ? {} : { 'authorization' => "Bearer #{TOKEN}" }

# Makes one call, with retries; returns the job in its response.
def call(method, request)
  until_reachable { method.call(request, deadline: Time.now + 10, metadata: METADATA).job }
end

# Returns the machine-readable reason of an error, from google.rpc.ErrorInfo.
def reason_of(error)
  info = error.to_rpc_status.details.find { |detail| detail.is(Google::Rpc::ErrorInfo) }
  info.unpack(Google::Rpc::ErrorInfo).reason
end

# Prints each new state of a job until it is done. To resume an interrupted watch, it calls again.
def watch(client, id)
  job = nil
  until_reachable do
    client.watch_job(V1::WatchJobRequest.new(id: id), metadata: METADATA).each do |message|
      puts "watch: #{message.event.job.state}" if message.event.job.state != job&.state
      job = message.event.job
      yield
    end
  end
  raise 'the watch ended with OK before the job was done' unless job.done
end

def work(client, seconds_per_step)
  # The request_id makes a retry safe: the job is created once.
  creation = V1::CreateJobRequest.new(
    job: { name: 'import customers', heartbeat_timeout: { seconds: 60 } },
    request_id: SecureRandom.uuid
  )
  created = call(client.method(:create_job), creation)
  id = created.id
  puts "job: #{id}", "created: #{created.state}"
  raise 'a second job was created' if call(client.method(:create_job), creation).id != id
  puts 'created again: the same job'

  # A claim names the attempt that it starts. Later updates name that attempt, so a stale worker cannot write.
  update = client.method(:update_job)
  claim = { job: { id: id, state: :JOB_STATE_IN_PROGRESS }, attempt: 1 }
  claimed = call(update, V1::UpdateJobRequest.new(**claim, request_id: SecureRandom.uuid))
  puts "claimed: #{claimed.state}, attempt #{claimed.attempt}"

  first = Queue.new
  watching = Thread.new do
    watch(client, id) { first.push(true) }
  ensure
    first.push(false)
  end
  first.pop

  # Of two claims of one attempt, only the first succeeds. This is the second.
  begin
    call(update, V1::UpdateJobRequest.new(**claim, request_id: SecureRandom.uuid))
    raise 'the second claim succeeded'
  rescue GRPC::FailedPrecondition => error
    puts "second claim: #{reason_of(error)}"
  end

  ending = :JOB_STATE_SUCCEEDED
  step = 0
  while step < 3 && ending == :JOB_STATE_SUCCEEDED
    sleep(seconds_per_step) # the work
    step += 1
    progress = { id: id, progress: 25.0 * step }
    job = call(update, V1::UpdateJobRequest.new(job: progress, attempt: claimed.attempt))
    puts "progress: #{job.progress.to_i}"
    ending = :JOB_STATE_CANCELLED if job.cancel_requested
  end
  result = Google::Protobuf::Struct.from_hash('steps' => step)
  ended = { id: id, state: ending, result: result }
  job = call(update, V1::UpdateJobRequest.new(job: ended, attempt: claimed.attempt))
  puts "ended: #{job.state}, progress #{job.progress.to_i}"
  watching.value # raises the error of the watch, if any

  begin
    call(client.method(:get_job), V1::GetJobRequest.new(id: 'no-such-job'))
    raise 'an unknown job was found'
  rescue GRPC::NotFound => error
    puts "unknown job: #{reason_of(error)}"
  end
end

# TLS, with the CA and the client's certificate and key (PEM) that the environment names.
def credentials
  ca, key, cert = ENV.values_at('JOBSTATUS_CA', 'JOBSTATUS_KEY', 'JOBSTATUS_CERT').map { |file| file && File.read(file) }
  ca ? GRPC::Core::ChannelCredentials.new(ca, key, cert) : :this_channel_is_insecure
end

address, seconds_per_step = ARGV
unless TOKEN.empty? || ENV['JOBSTATUS_CA'] || address.match?(/\A(localhost|127(\.\d+){3}|\[::1\]):\d+\z/)
  abort 'a token without TLS is for loopback only: set JOBSTATUS_CA'
end
settings = {
  'grpc.keepalive_time_ms' => 20_000, # pings detect that the server's machine is down
  'grpc.http2.max_pings_without_data' => 0,
  'grpc.service_config' => File.read(File.join(__dir__, '../service_config.json')) # gRPC retries by itself
}
client = V1::JobStatusService::Stub.new(
  address,
  credentials,
  channel_args: settings
)
work(client, Float(seconds_per_step || 0.1))
