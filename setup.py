"""Install with ``pip install -c constraints.txt -e .`` (ranges here, one tested set there)."""

from setuptools import find_packages, setup

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
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "scikit-learn>=1.4",
        "pillow>=10.0",
    ],
    extras_require={
        "deploy": DEPLOY,  # scripts/export.py, --runtime onnxruntime and openvino
        "lmdb": ["lmdb>=1.4"],  # scripts/prepare_reference.py --lmdb: LSUN as it is published
        "dev": [*DEPLOY, "lmdb>=1.4", "pytest>=8.0", "pytest-xdist>=3.5", "ruff>=0.6"],
    },
)
