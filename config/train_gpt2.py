# GPT-2 (124M) from scratch on OpenWebText, to a val loss of about 2.85. Eight A100 GPUs need about four days:
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

wandb_log = True  # monitor a run of several days remotely
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 sequences x 1024 tokens x 40 micro-batches = 491,520 tokens per step for any number of GPUs that divides 40
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 600,000 steps x 491,520 tokens: about 300 billion, as for GPT-3
max_iters = 600000
lr_decay_iters = 600000  # the decay ends with the run

eval_interval = 1000  # half the default
eval_iters = 200
log_interval = 10  # print every tenth step

weight_decay = 1e-1  # as in GPT-3
