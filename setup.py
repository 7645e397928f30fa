"""Install with ``pip install -c constraints.txt -e .`` (ranges here, one tested set there)."""

from setuptools import find_packages, setup

# diffusers 0.42 needs Python 3.11; on 3.10 the rest is installed.
DIFFUSERS = ["diffusers>=0.42; python_version >= '3.11'", "accelerate>=1.10; python_version >= '3.11'"]
OF_TESTS = ["comfy-kitchen>=0.2.40; python_version >= '3.11'", "peft>=0.17; python_version >= '3.11'"]
DEPLOY = ["onnx>=1.17", "onnxscript>=0.3", "onnxruntime>=1.20", "openvino>=2024.6"]

setup(
    name="qdiff",
    version="0.1.0",
    description="Post-training quantization of diffusion models: Q-Diffusion and relatives on one engine",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["qdiff*", "ddim*", "ldm*"]),
    package_data={"qdiff.report": ["*.j2"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "omegaconf>=2.3",
        "pytorch-lightning>=2.6",
        "einops>=0.8",
        "transformers>=4.44",
        "tqdm>=4.66",
        "torch-fidelity>=0.3.0",
        "torchmetrics>=1.4",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "pillow>=10.0",
    ],
    extras_require={
        "diffusers": DIFFUSERS,  # quantized networks in diffusers pipelines
        "deploy": DEPLOY,  # scripts/export.py, --runtime onnxruntime and openvino
        "lmdb": ["lmdb>=1.4"],  # scripts/prepare_reference.py --lmdb: LSUN as it is published
        "dev": [*DEPLOY, *DIFFUSERS, *OF_TESTS, "lmdb>=1.4", "pytest>=8.0", "pytest-xdist>=3.5", "ruff>=0.6"],
    },
)
