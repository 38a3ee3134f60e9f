# nanoGPT's defaults that differ from Config(). train.py always starts from these settings; llm-train starts from them
# if its first preset is a Python file.

dataset = "openwebtext"
sample_order = "random"

# GPT-2 (124M)
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
dropout = 0.0

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens per step
batch_size = 12
gradient_accumulation_steps = 5 * 8

max_iters = 600000
inclusive_max_iters = True  # steps 0 to max_iters
lr_decay_iters = 600000
warmup_iters = 2000
learning_rate = 6e-4
min_lr = 6e-5
beta2 = 0.95

eval_interval = 2000
eval_iters = 200
log_interval = 1
tensorboard = False
