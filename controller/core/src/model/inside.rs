//! What a running container shows of itself from inside. Servers report success for a container that was restored with
//! files that belong to nobody: nothing but a look tells.

/// What was seen inside a running container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Inside {
    /// Whether a program could be run in it.
    pub answers: bool,
    /// Whether root in there owns the root directory; `None`: neither a program nor the server could tell.
    pub owns_root: Option<bool>,
    /// Whether systemd started everything in there.
    pub systemd: bool,
}

impl Inside {
    /// What is wrong in there, after the name of the instance.
    pub fn wrong(&self) -> Option<&'static str> {
        match (self.answers, self.owns_root) {
            (false, _) => Some("answers to nothing: no program can be run in it"),
            (true, Some(false)) => Some("has files that belong to nobody, so that nothing can be written in it"),
            (true, None) => Some("does not tell whom its files belong to"),
            (true, Some(true)) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_sound_only_if_it_answers_and_owns_its_files() {
        let inside = |answers, owns_root| Inside {
            answers,
            owns_root,
            systemd: false,
        };
        assert_eq!(inside(true, Some(true)).wrong(), None);
        for broken in [
            inside(false, Some(true)),
            inside(true, Some(false)),
            inside(true, None),
            inside(false, None),
        ] {
            assert!(broken.wrong().is_some(), "{broken:?}");
        }
    }
}
