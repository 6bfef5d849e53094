"""Jobs: what a client does with a hosted base model, from a specification to a result.

`finetune.run` trains an adapter, `generate.run` answers prompts. Knows sessions, transformers
and peft; knows no sockets, no terminal and no environment variables.
"""
