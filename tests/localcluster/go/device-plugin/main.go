// Command device-plugin advertises pretended GPUs to a kubelet by the real device plugin API.
//
// A device fails when a file of its name appears in the folder given by -failed, and is well again when it is gone.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	api "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const (
	socketName = "lockstep-gpu.sock"
	// How often the folder of failed devices is looked at: a test should not wait, and reading an empty folder is free.
	pollInterval = 200 * time.Millisecond
)

type plugin struct {
	api.UnimplementedDevicePluginServer
	names  []string
	failed string
}

func (p *plugin) devices() []*api.Device {
	devices := make([]*api.Device, len(p.names))
	for i, name := range p.names {
		health := api.Healthy
		if _, err := os.Stat(filepath.Join(p.failed, name)); err == nil {
			health = api.Unhealthy
		}
		devices[i] = &api.Device{ID: name, Health: health}
	}
	return devices
}

func (p *plugin) GetDevicePluginOptions(context.Context, *api.Empty) (*api.DevicePluginOptions, error) {
	return &api.DevicePluginOptions{}, nil
}

// ListAndWatch sends the devices at once, then whenever the health of one of them changes.
func (p *plugin) ListAndWatch(_ *api.Empty, stream grpc.ServerStreamingServer[api.ListAndWatchResponse]) error {
	sameHealth := func(a, b *api.Device) bool { return a.Health == b.Health }
	var sent []*api.Device
	for {
		devices := p.devices()
		if sent == nil || !slices.EqualFunc(devices, sent, sameHealth) {
			log.Printf("devices: %v", devices)
			if err := stream.Send(&api.ListAndWatchResponse{Devices: devices}); err != nil {
				return err
			}
			sent = devices
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-time.After(pollInterval):
		}
	}
}

// Allocate tells each container which devices are its own, by the variable that NVIDIA's plugin uses.
func (p *plugin) Allocate(_ context.Context, request *api.AllocateRequest) (*api.AllocateResponse, error) {
	response := &api.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &api.ContainerAllocateResponse{
			Envs: map[string]string{"NVIDIA_VISIBLE_DEVICES": strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}

// register announces the plugin. The kubelet calls back on the plugin's socket.
func register(resource string) error {
	connection, err := grpc.NewClient("unix://"+api.KubeletSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	_, err = api.NewRegistrationClient(connection).Register(ctx, &api.RegisterRequest{
		Version: api.Version, Endpoint: socketName, ResourceName: resource,
	})
	return err
}

// serve runs until the kubelet removes the socket, which it does when it starts.
func serve(p *plugin, resource string) error {
	socket := filepath.Join(api.DevicePluginPath, socketName)
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	api.RegisterDevicePluginServer(server, p)
	defer server.Stop()
	go func() {
		if err := server.Serve(listener); err != nil {
			log.Printf("serve: %v", err)
		}
	}()
	if err := register(resource); err != nil {
		return fmt.Errorf("register: %w", err)
	}
	log.Printf("registered %d devices as %s", len(p.names), resource)
	for {
		time.Sleep(pollInterval)
		if _, err := os.Stat(socket); err != nil {
			return err
		}
	}
}

func main() {
	resource := flag.String("resource", "nvidia.com/gpu", "name of the extended resource")
	prefix := flag.String("prefix", "GPU-", "what the devices' names start with; a number follows")
	count := flag.Int("count", 1, "number of devices")
	failed := flag.String("failed", "", "folder in which a file named like a device makes it unhealthy")
	flag.Parse()

	p := &plugin{failed: *failed}
	for i := range *count {
		p.names = append(p.names, fmt.Sprintf("%s%d", *prefix, i))
	}
	for {
		log.Print(serve(p, *resource))
		time.Sleep(pollInterval) // the kubelet is not there yet, or has just restarted
	}
}
