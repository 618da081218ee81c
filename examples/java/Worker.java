import com.google.gson.Gson;
import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.protobuf.Struct;
import com.google.protobuf.Value;
import com.google.rpc.ErrorInfo;
import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import io.jobstatus.v1.CreateJobRequest;
import io.jobstatus.v1.GetJobRequest;
import io.jobstatus.v1.JobState;
import io.jobstatus.v1.JobStatus;
import io.jobstatus.v1.JobStatusServiceGrpc;
import io.jobstatus.v1.JobStatusServiceGrpc.JobStatusServiceBlockingStub;
import io.jobstatus.v1.UpdateJobRequest;
import io.jobstatus.v1.WatchJobRequest;
import io.jobstatus.v1.WatchJobResponse;
import java.io.File;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.Reader;
import java.util.EnumSet;
import java.util.Iterator;
import java.util.Map;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.TimeUnit;

/** A worker and a watcher of one job. Usage: java Worker HOST:PORT [SECONDS_PER_STEP] */
public class Worker {
    /**
     * UNAVAILABLE, DEADLINE_EXCEEDED: the server cannot be reached. CANCELLED: the server was shutting down when the
     * call arrived (this program cancels no calls).
     */
    private static final Set<Status.Code> AWAY =
            EnumSet.of(Status.Code.UNAVAILABLE, Status.Code.DEADLINE_EXCEEDED, Status.Code.CANCELLED);

    private final JobStatusServiceBlockingStub stub;

    Worker(JobStatusServiceBlockingStub stub) {
        this.stub = stub;
    }

    /** Returns the service config on the class path, with which gRPC retries by itself. */
    @SuppressWarnings("unchecked")
    static Map<String, ?> serviceConfig() throws Exception {
        try (Reader text = new InputStreamReader(Worker.class.getResourceAsStream("/service_config.json"), "UTF-8")) {
            return new Gson().fromJson(text, Map.class);
        }
    }

    /** Retries a call, with backoff and jitter, however long the server is away. */
    static <T> T untilReachable(Callable<T> attempt) throws Exception {
        for (long pause = 100; ; pause = Math.min(2 * pause, 10_000)) {
            long begunAt = System.nanoTime();
            try {
                return attempt.call();
            } catch (StatusRuntimeException error) {
                if (!AWAY.contains(error.getStatus().getCode())) {
                    throw error;
                }
            }
            if (System.nanoTime() - begunAt > 10e9) {
                pause = 100; // reset after a call that ran for long
            }
            Thread.sleep((long) (Math.random() * pause));
        }
    }

    /** Returns the stub with a deadline for one call. */
    JobStatusServiceBlockingStub inTime() {
        return stub.withDeadlineAfter(10, TimeUnit.SECONDS);
    }

    JobStatus create(CreateJobRequest request) throws Exception {
        return untilReachable(() -> inTime().createJob(request).getJob());
    }

    JobStatus update(UpdateJobRequest request) throws Exception {
        return untilReachable(() -> inTime().updateJob(request).getJob());
    }

    /** Returns the error of a call that must fail with `code`. */
    static StatusRuntimeException refusal(Callable<JobStatus> call, Status.Code code) throws Exception {
        try {
            throw new IllegalStateException("the call succeeded: " + call.call());
        } catch (StatusRuntimeException error) {
            if (error.getStatus().getCode() != code) {
                throw error;
            }
            return error;
        }
    }

    /** Returns the machine-readable reason of an error, from google.rpc.ErrorInfo. */
    static String reasonOf(StatusRuntimeException error) throws Exception {
        for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
            if (detail.is(ErrorInfo.class)) {
                return detail.unpack(ErrorInfo.class).getReason();
            }
        }
        return "none";
    }

    /** Prints each new state of a job until it is done. To resume an interrupted watch, it calls again. */
    JobStatus watch(String id, CompletableFuture<Void> begun) throws Exception {
        JobStatus[] job = {JobStatus.getDefaultInstance()};
        untilReachable(() -> {
            WatchJobRequest request = WatchJobRequest.newBuilder().setId(id).build();
            for (Iterator<WatchJobResponse> messages = stub.watchJob(request); messages.hasNext(); ) {
                JobStatus newest = messages.next().getEvent().getJob();
                if (newest.getState() != job[0].getState()) {
                    System.out.println("watch: " + newest.getState());
                }
                job[0] = newest;
                begun.complete(null);
            }
            return null;
        });
        if (!job[0].getDone()) {
            throw new IllegalStateException("the watch ended with OK before the job was done");
        }
        return job[0];
    }

    /** Runs a task in a daemon thread, which does not prevent the program from exiting. */
    static void inBackground(Runnable task) {
        Thread thread = new Thread(task);
        thread.setDaemon(true);
        thread.start();
    }

    void work(double secondsPerStep) throws Exception {
        // The request_id makes a retry safe: the job is created once.
        JobStatus.Builder wanted = JobStatus.newBuilder().setName("import customers")
                .setHeartbeatTimeout(Duration.newBuilder().setSeconds(60));
        CreateJobRequest creation = CreateJobRequest.newBuilder()
                .setJob(wanted).setRequestId(UUID.randomUUID().toString()).build();
        JobStatus created = create(creation);
        String id = created.getId();
        System.out.println("job: " + id);
        System.out.println("created: " + created.getState());
        if (!create(creation).getId().equals(id)) {
            throw new IllegalStateException("a second job was created");
        }
        System.out.println("created again: the same job");

        // A claim names the attempt that it starts. Later updates name that attempt, so a stale worker cannot write.
        UpdateJobRequest.Builder claim = UpdateJobRequest.newBuilder()
                .setJob(JobStatus.newBuilder().setId(id).setState(JobState.JOB_STATE_IN_PROGRESS))
                .setAttempt(1);
        JobStatus claimed = update(claim.setRequestId(UUID.randomUUID().toString()).build());
        System.out.println("claimed: " + claimed.getState() + ", attempt " + claimed.getAttempt());

        CompletableFuture<Void> begun = new CompletableFuture<>();
        CompletableFuture<JobStatus> watching = CompletableFuture.supplyAsync(() -> {
            try {
                return watch(id, begun);
            } catch (Exception error) {
                begun.completeExceptionally(error);
                throw new IllegalStateException(error);
            }
        }, Worker::inBackground);
        begun.get();

        // Of two claims of one attempt, only the first succeeds. This is the second.
        UpdateJobRequest late = claim.setRequestId(UUID.randomUUID().toString()).build();
        System.out.println("second claim: " + reasonOf(refusal(() -> update(late), Status.Code.FAILED_PRECONDITION)));

        JobState end = JobState.JOB_STATE_SUCCEEDED;
        int step = 0;
        while (step < 3 && end == JobState.JOB_STATE_SUCCEEDED) {
            Thread.sleep((long) (secondsPerStep * 1000)); // the work
            step++;
            JobStatus.Builder progress = JobStatus.newBuilder().setId(id).setProgress(25 * step);
            JobStatus job = update(
                    UpdateJobRequest.newBuilder().setJob(progress).setAttempt(claimed.getAttempt()).build());
            System.out.println("progress: " + Math.round(job.getProgress()));
            if (job.getCancelRequested()) {
                end = JobState.JOB_STATE_CANCELLED;
            }
        }
        Struct result = Struct.newBuilder()
                .putFields("steps", Value.newBuilder().setNumberValue(step).build()).build();
        JobStatus.Builder ending = JobStatus.newBuilder().setId(id).setState(end).setResult(result);
        JobStatus ended = update(
                UpdateJobRequest.newBuilder().setJob(ending).setAttempt(claimed.getAttempt()).build());
        System.out.println("ended: " + ended.getState() + ", progress " + Math.round(ended.getProgress()));
        watching.get();

        GetJobRequest unknown = GetJobRequest.newBuilder().setId("no-such-job").build();
        System.out.println("unknown job: " + reasonOf(
                refusal(() -> untilReachable(() -> inTime().getJob(unknown).getJob()), Status.Code.NOT_FOUND)));
    }

    /** Returns TLS, with the CA and the client's certificate and key (PEM) that the environment names. */
    static ChannelCredentials credentials() throws IOException {
        String ca = System.getenv("JOBSTATUS_CA");
        String cert = System.getenv("JOBSTATUS_CERT");
        if (ca == null) {
            return InsecureChannelCredentials.create();
        }
        TlsChannelCredentials.Builder tls = TlsChannelCredentials.newBuilder().trustManager(new File(ca));
        if (cert != null) {
            tls.keyManager(new File(cert), new File(System.getenv("JOBSTATUS_KEY")));
        }
        return tls.build();
    }

    /** Returns the metadata of each call: the caller's token, if the environment has one. */
    static Metadata metadata(String address) {
        Metadata metadata = new Metadata();
        String token = System.getenv("JOBSTATUS_TOKEN");
        if (token != null && !token.isEmpty()) {
            if (System.getenv("JOBSTATUS_CA") == null
                    && !address.matches("(localhost|127(\\.\\d+){3}|\\[::1\\]):\\d+")) {
                throw new IllegalStateException("a token without TLS is for loopback only: set JOBSTATUS_CA");
            }
            metadata.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
        }
        return metadata;
    }

    public static void main(String[] arguments) throws Exception {
        ManagedChannel channel = Grpc.newChannelBuilder(arguments[0], credentials())
                .intercept(MetadataUtils.newAttachHeadersInterceptor(metadata(arguments[0])))
                .keepAliveTime(20, TimeUnit.SECONDS) // detects that the server's machine is down
                .defaultServiceConfig(serviceConfig())
                .enableRetry()
                .build();
        try {
            double secondsPerStep = arguments.length > 1 ? Double.parseDouble(arguments[1]) : 0.1;
            new Worker(JobStatusServiceGrpc.newBlockingStub(channel)).work(secondsPerStep);
        } finally {
            channel.shutdownNow();
        }
    }
}
