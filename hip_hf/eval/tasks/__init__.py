"""Long-context tasks for lm-eval that need no network: a YAML file each, generators in the modules
beside them.

Metadata (`--metadata max_seq_lengths=[4096,8192] samples=50 haystack=my.txt data_seed=1`) that all
of them take:

    max_seq_lengths  tokens of prompt and answer; a list [4096]
    samples          documents per length [50], at least as many as processes; `--limit` would cut
                     the last lengths
    data_seed        of what is drawn [0]; `seed` is taken: it is a model argument
    haystack         a text file, or `synthetic` for random sentences; default: the novel shipped
                     with the package
    tokenizer        what lengths are counted with; default: the tokenizer of the model arguments'
                     `pretrained`

Scores are reported under `acc` (all lengths) and under each length, as lm-eval's RULER tasks do.
The RULER families use the texts of lm-eval's own RULER tasks, so that scores compare; what they are
filled with is drawn here.
"""
