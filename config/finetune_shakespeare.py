# OpenAI's largest GPT-2 finetuned on tiny Shakespeare. Short of memory: --init_from=gpt2 or gpt2-medium.

import time

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())  # every attempt under a name of its own

# an epoch is 301,966 / 32,768 = 9.2 steps: the whole run is two epochs, so look often and keep only what improves
max_iters = 20
eval_interval = 5
eval_iters = 40
always_save_checkpoint = False

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens a step; one sequence at a time saves memory
batch_size = 1
gradient_accumulation_steps = 32

# the weights are near where they should be: small steps, and a run too short for a schedule
learning_rate = 3e-5
decay_lr = False
