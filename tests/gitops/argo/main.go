// The parts of Argo CD that a GitOps test needs, in one program; without its API server, user interface and notifications it builds in half the time.
//
//	argo application-controller ARGS   argo repo-server ARGS   as Argo CD's own programs of these names
//	argo lua test DIR                  every health_test.yaml and action_test.yaml below DIR, a folder laid out as Argo CD's
//	                                   resource_customizations; one line per test, exit status 1 if one fails
//	argo lua health DIR                the health of every object of a JSON list on standard input, as a JSON list of {status, message}
//	argo lua action DIR ACTION         what an action makes of the object on standard input
package main

import (
	"errors"
	"os"

	controller "github.com/argoproj/argo-cd/v3/cmd/argocd-application-controller/commands"
	repo "github.com/argoproj/argo-cd/v3/cmd/argocd-repo-server/commands"
	"github.com/spf13/cobra"
)

func main() {
	if len(os.Args) < 2 {
		fail(errors.New("application-controller, repo-server or lua"))
	}
	var command *cobra.Command
	switch os.Args[1] {
	case "lua":
		luaMain(os.Args[2:])
		return
	case "application-controller":
		command = controller.NewCommand()
	case "repo-server":
		command = repo.NewCommand()
	default:
		fail(errors.New(os.Args[1] + ": unknown"))
	}
	command.SetArgs(os.Args[2:])
	if err := command.Execute(); err != nil {
		os.Exit(1)
	}
}
