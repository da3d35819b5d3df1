module berth.dev/tests/gitops/git-server

go 1.26.0
