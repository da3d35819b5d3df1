//! skeleton
use crate::cli::{Fatal, Options};
pub(crate) fn main(options: Options) -> Result<(), Fatal> {
    crate::telemetry::init(options.log_format, &options.log_level)?;
    Ok(())
}
