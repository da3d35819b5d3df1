//! The command line. Every flag of `berth controller` can also be set by an environment variable.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand, ValueEnum};

use crate::{controller, definitions};

/// Keeps Incus and LXD instances where Git says they should live.
#[derive(Debug, Parser)]
#[command(name = "berth", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the Kubernetes controller.
    Controller(Options),
    /// Print the CustomResourceDefinitions, to be applied with `kubectl apply --server-side -f -`.
    Crds {
        /// Write one file per kind into this folder instead.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

/// Options of `berth controller`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Kubeconfig file. Default: the cluster's own service account, or ~/.kube/config.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// Namespaces to work in (repeat the flag, or separate by commas). Default: all.
    #[arg(
        long = "namespace",
        env = "BERTH_NAMESPACES",
        value_name = "NAME",
        value_delimiter = ','
    )]
    pub namespaces: Vec<String>,
    /// Let only one of several controllers act, by a Lease.
    #[arg(long, env = "BERTH_LEADER_ELECT", value_name = "BOOL", default_value_t = true, action = ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub leader_elect: bool,
    /// Namespace of the Lease. Default: the pod's, else that of the kubeconfig's context, else berth-system.
    #[arg(long, env = "BERTH_LEASE_NAMESPACE", value_name = "NAME")]
    pub lease_namespace: Option<String>,
    /// Name of the Lease.
    #[arg(
        long,
        env = "BERTH_LEASE_NAME",
        value_name = "NAME",
        default_value = "berth-controller"
    )]
    pub lease_name: String,
    /// Address for /livez, /readyz, /metrics and /moves.
    #[arg(
        long,
        env = "BERTH_LISTEN_ADDRESS",
        value_name = "ADDRESS",
        default_value = "0.0.0.0:8080"
    )]
    pub listen_address: SocketAddr,
    /// Folder for backups on their way between servers that cannot stream them (transfer Backup). Default: none.
    #[arg(long, env = "BERTH_SCRATCH_DIR", value_name = "DIR")]
    pub scratch_dir: Option<PathBuf>,
    /// How much that folder may hold at the same time, e.g. 500Mi or 10Gi.
    #[arg(long, env = "BERTH_SCRATCH_LIMIT", value_name = "SIZE", default_value = "10Gi", value_parser = crate::scratch::parse_size)]
    pub scratch_limit: u64,
    /// Form of the log lines.
    #[arg(long, env = "BERTH_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
    /// What is logged: a level, or a filter such as `info,berth=debug`.
    #[arg(long, env = "RUST_LOG", value_name = "FILTER", default_value = "info")]
    pub log_level: String,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Crds { dir: None } => definitions::print(&mut io::stdout().lock()),
        Command::Crds { dir: Some(dir) } => definitions::write(&dir),
        Command::Controller(options) => controller::main(options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // nobody can be told that standard error is gone
            let _ = writeln!(io::stderr(), "berth: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Why the program ends with a failure: one sentence for the terminal.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Fatal(pub String);

impl Fatal {
    /// A failure while `attempted`.
    pub fn new(attempted: &str, error: impl std::fmt::Display) -> Self {
        Self(format!("{attempted}: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    #[test]
    fn namespaces_can_be_repeated_and_listed() {
        let cli = Cli::try_parse_from(["berth", "controller", "--namespace", "a,b", "--namespace=c"]);
        let Ok(Cli {
            command: Command::Controller(options),
        }) = cli
        else {
            panic!("{cli:?}")
        };
        assert_eq!(options.namespaces, ["a", "b", "c"]);
        assert!(options.leader_elect);
    }

    #[test]
    fn leader_election_can_be_turned_off_with_a_value_and_on_without() {
        let parsed = |flag: &str| {
            let cli = Cli::try_parse_from(["berth", "controller", flag]);
            match cli.map(|c| c.command) {
                Ok(Command::Controller(options)) => options.leader_elect,
                other => panic!("{other:?}"),
            }
        };
        assert!(!parsed("--leader-elect=false"));
        assert!(parsed("--leader-elect"));
    }
}
