// A worker and a watcher of one job. Usage: worker HOST:PORT [SECONDS_PER_STEP]
package main

import (
	"context"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"os"
	"regexp"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"

	pb "github.com/jobstatus/jobstatus-grpc/gen/go/jobstatus/v1"
)

// With it, gRPC retries by itself. `make` copies it beside this file, as go:embed requires.
//
//go:embed service_config.json
var serviceConfig string

// untilReachable retries a call, with backoff and jitter, however long the server is away.
func untilReachable(attempt func() error) error {
	for pause := 100 * time.Millisecond; ; pause = 2 * pause {
		begunAt := time.Now()
		err := attempt()
		switch status.Code(err) {
		case codes.Unavailable, codes.DeadlineExceeded: // the server cannot be reached
		case codes.Canceled: // the server was shutting down when the call arrived; this program cancels no calls
		default:
			return err
		}
		if time.Since(begunAt) > 10*time.Second { // reset after a call that ran for long
			pause = 100 * time.Millisecond
		} else if pause > 10*time.Second {
			pause = 10 * time.Second
		}
		time.Sleep(time.Duration(rand.Int63n(int64(pause))))
	}
}

// call calls a method of the client, with retries.
func call[Request, Reply any](
	method func(context.Context, Request, ...grpc.CallOption) (Reply, error), request Request,
) (reply Reply, err error) {
	err = untilReachable(func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		reply, err = method(ctx, request)
		return err
	})
	return reply, err
}

// reasonOf returns the machine-readable reason of an error, from google.rpc.ErrorInfo.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return "none"
}

// watch prints each new state of a job until it is done. To resume an interrupted watch, it calls again.
func watch(client pb.JobStatusServiceClient, id string, begun chan<- bool) error {
	job := &pb.JobStatus{}
	err := untilReachable(func() error {
		stream, err := client.WatchJob(context.Background(), &pb.WatchJobRequest{Id: id})
		for err == nil {
			var message *pb.WatchJobResponse
			if message, err = stream.Recv(); err != nil {
				break
			}
			if message.Event.Job.State != job.State {
				fmt.Println("watch:", message.Event.Job.State)
			}
			job = message.Event.Job
			select {
			case begun <- true:
			default:
			}
		}
		if err == io.EOF { // the stream ended with OK
			return nil
		}
		return err
	})
	if err == nil && !job.Done {
		return errors.New("the watch ended with OK before the job was done")
	}
	return err
}

func work(client pb.JobStatusServiceClient, stepTime time.Duration) {
	// The request_id makes a retry safe: the job is created once.
	creation := &pb.CreateJobRequest{
		Job:       &pb.JobStatus{Name: "import customers", HeartbeatTimeout: durationpb.New(time.Minute)},
		RequestId: newRequestID(),
	}
	created, err := call(client.CreateJob, creation)
	check(err == nil, err)
	id := created.Job.Id
	fmt.Println("job:", id)
	fmt.Println("created:", created.Job.State)
	again, err := call(client.CreateJob, creation)
	check(err == nil && again.Job.Id == id, again, err)
	fmt.Println("created again: the same job")

	// A claim names the attempt that it starts. Later updates name that attempt, so a stale worker cannot write.
	claim := &pb.UpdateJobRequest{
		Job:       &pb.JobStatus{Id: id, State: pb.JobState_JOB_STATE_IN_PROGRESS},
		Attempt:   1,
		RequestId: newRequestID(),
	}
	reply, err := call(client.UpdateJob, claim)
	check(err == nil, err)
	attempt := reply.Job.Attempt
	fmt.Printf("claimed: %v, attempt %d\n", reply.Job.State, attempt)

	begun, ended := make(chan bool, 1), make(chan error, 1)
	go func() { ended <- watch(client, id, begun); close(begun) }()
	<-begun

	// Of two claims of one attempt, only the first succeeds. This is the second.
	claim.RequestId = newRequestID()
	_, err = call(client.UpdateJob, claim)
	check(status.Code(err) == codes.FailedPrecondition, err)
	fmt.Println("second claim:", reasonOf(err))

	end, step := pb.JobState_JOB_STATE_SUCCEEDED, 0
	for step < 3 && end == pb.JobState_JOB_STATE_SUCCEEDED {
		time.Sleep(stepTime) // the work
		step++
		progress := &pb.JobStatus{Id: id, Progress: proto.Float64(25 * float64(step))}
		reply, err = call(client.UpdateJob, &pb.UpdateJobRequest{Job: progress, Attempt: attempt})
		check(err == nil, err)
		fmt.Println("progress:", reply.Job.GetProgress())
		if reply.Job.CancelRequested {
			end = pb.JobState_JOB_STATE_CANCELLED
		}
	}
	result, err := structpb.NewStruct(map[string]any{"steps": step})
	check(err == nil, err)
	ending := &pb.JobStatus{Id: id, State: end, Result: result}
	reply, err = call(client.UpdateJob, &pb.UpdateJobRequest{Job: ending, Attempt: attempt})
	check(err == nil, err)
	fmt.Printf("ended: %v, progress %v\n", reply.Job.State, reply.Job.GetProgress())
	err = <-ended
	check(err == nil, err)

	_, err = call(client.GetJob, &pb.GetJobRequest{Id: "no-such-job"})
	check(status.Code(err) == codes.NotFound, err)
	fmt.Println("unknown job:", reasonOf(err))
}

func newRequestID() string {
	bytes := make([]byte, 16)
	_, err := cryptorand.Read(bytes)
	check(err == nil, err)
	return fmt.Sprintf("%x", bytes)
}

func check(ok bool, otherwise ...any) {
	if !ok {
		log.Fatalln(otherwise...)
	}
}

// token is the caller's, which is sent with each call.
type token string

func (t token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if t == "" {
		return nil, nil
	}
	return map[string]string{"authorization": "Bearer " + string(t)}, nil
}

func (t token) RequireTransportSecurity() bool { return false } // main requires it beyond loopback

var loopback = regexp.MustCompile(`^(localhost|127(\.\d+){3}|\[::1\]):\d+$`)

// security returns TLS, with the CA and the client's certificate and key (PEM) that the environment names.
func security() grpc.DialOption {
	ca, cert, key := os.Getenv("JOBSTATUS_CA"), os.Getenv("JOBSTATUS_CERT"), os.Getenv("JOBSTATUS_KEY")
	if ca == "" {
		return grpc.WithInsecure()
	}
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	pem, err := os.ReadFile(ca)
	check(err == nil && config.RootCAs.AppendCertsFromPEM(pem), "no certificate in ", ca)
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		check(err == nil, err)
		config.Certificates = []tls.Certificate{pair}
	}
	return grpc.WithTransportCredentials(credentials.NewTLS(config))
}

func main() {
	rand.Seed(time.Now().UnixNano())
	stepTime := 100 * time.Millisecond
	if len(os.Args) > 2 {
		var err error
		stepTime, err = time.ParseDuration(os.Args[2] + "s")
		check(err == nil, err)
	}
	// Keepalive pings detect that the server's machine is down.
	pings := grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second})
	caller := token(os.Getenv("JOBSTATUS_TOKEN"))
	check(caller == "" || os.Getenv("JOBSTATUS_CA") != "" || loopback.MatchString(os.Args[1]),
		"a token without TLS is for loopback only: set JOBSTATUS_CA")
	channel, err := grpc.Dial(os.Args[1], security(), pings, grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithPerRPCCredentials(caller))
	check(err == nil, err)
	defer channel.Close()
	work(pb.NewJobStatusServiceClient(channel), stepTime)
}
