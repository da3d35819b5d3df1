// git-server ROOT FILE serves the Git repositories below ROOT over smart HTTP, to read only, on a free port of loopback, and writes its URL
// into FILE once it listens. Flux and Argo CD need smart HTTP; git's own http-backend speaks it, and only wants a web server.
package main

import (
	"log"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

func main() {
	if len(os.Args) != 3 {
		log.Fatal("git-server ROOT FILE")
	}
	root, file := os.Args[1], os.Args[2]
	core, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		log.Fatalf("git --exec-path: %v", err)
	}
	backend := &cgi.Handler{
		Path: filepath.Join(strings.TrimSpace(string(core)), "git-http-backend"),
		Env: []string{
			"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1",
			// the tests make the repositories, perhaps as another user
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
		},
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	// under another name first: who sees the file sees all of it
	url := "http://" + listener.Addr().String()
	if err := os.WriteFile(file+".new", []byte(url), 0o644); err != nil {
		log.Fatal(err)
	}
	if err := os.Rename(file+".new", file); err != nil {
		log.Fatal(err)
	}
	log.Fatal(http.Serve(listener, backend))
}
