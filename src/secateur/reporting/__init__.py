"""Tables made into verdicts, figures, pages and cards."""
