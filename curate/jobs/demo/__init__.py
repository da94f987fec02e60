"""The embedded demo: an arithmetic word-problem task and a tiny Llama with real learning dynamics. No downloads.

`task` generates rows, `model` the tokenizer and the Llama, `pretrain` makes the base that ships in `base/`, `training` fine-tunes it
(SFT with checkpoints, DPO), `line` walks the whole of `curate demo`.
"""
