# OpenAI's largest GPT-2 finetuned on tiny Shakespeare. With less memory: --init_from=gpt2 or gpt2-medium.

import time

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())  # each run has its own name

# an epoch is 301,966 / 32,768 = 9.2 steps, so the run is about two epochs; save only if the val loss improves
max_iters = 20
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per step; one sequence at a time saves memory
batch_size = 1
gradient_accumulation_steps = 32

# pretrained weights need small steps; the run is too short for a schedule
learning_rate = 3e-5
decay_lr = False
