//! The program `berth`: reads the command line and calls the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    berth::cli::main()
}
