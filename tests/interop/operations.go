// Google's Go client of google.longrunning.Operations: waits for an operation, lists the done ones, and deletes it.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/golang/protobuf/ptypes"
	"google.golang.org/genproto/googleapis/longrunning"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

func main() {
	connection, err := grpc.Dial(os.Args[1], grpc.WithInsecure())
	if err != nil {
		panic(err)
	}
	name := os.Args[2]
	client := longrunning.NewOperationsClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	fmt.Println("waiting")
	timeout := ptypes.DurationProto(10 * time.Second)
	operation, err := client.WaitOperation(ctx, &longrunning.WaitOperationRequest{Name: name, Timeout: timeout})
	fmt.Println(operation.GetName(), operation.GetDone(), operation.GetError().GetCode(), status.Code(err))
	page, err := client.ListOperations(ctx, &longrunning.ListOperationsRequest{Name: "jobs", Filter: "done = true"})
	fmt.Println(len(page.GetOperations()), status.Code(err))
	_, err = client.DeleteOperation(ctx, &longrunning.DeleteOperationRequest{Name: name})
	fmt.Println(status.Code(err))
	_, err = client.GetOperation(ctx, &longrunning.GetOperationRequest{Name: name})
	fmt.Println(status.Code(err))
}
