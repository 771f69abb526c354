"""Whether the table of SGLang's methods is still complete: a release's syntax trees against it.

A file each: `sources` opens a release, `summaries` says what its functions do, `paths` which of
them run outside every wrapped method, `reliances` which of SGLang's attributes the hook reads,
`judged` what a maintainer has looked at already, `signatures` how the wrapped methods are called,
`findings` and `check` what is left to act on, `history` how well all that would have done on the
releases that there have been.  SGLang is never imported.
"""
