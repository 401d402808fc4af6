"""Exports a student as a folder that diffusers opens.

    $ python -m tools.export export --model assets/toy --student out/stage2/merged --output_dir out/osv
    $ python -m tools.export merge --model stabilityai/... --student lora.safetensors --output_dir out/merged
    $ python -m tools.export unmerge --model out/merged --student lora.safetensors --output_dir out/plain

    export, merge       writes the pipeline of --model with the UNet of --student, or with its LoRA merged in
    unmerge             writes the pipeline of --model with the LoRA of --student subtracted

The folder holds all networks of the pipeline, diffusers' configuration files, licences and a model card with
the code that samples it. --push_to_hub uploads it.
"""
import re
import shutil
from itertools import chain
from pathlib import Path

import model
from lora import load_lora, load_student, merge_lora
from support import checkpoint
from support.checkpoint import ASSETS, DTYPES, SVD, ModelError, find_folder, replacing, save_network
from support.engine import command_line


def export(args):
    """Writes the pipeline of --model, with --student as or in its UNet, and a model card, README.md, to
    --output_dir.

    fp16 and bf16 weights get a suffix in their file names, and diffusers opens them with variant="fp16" or
    "bf16". An earlier export's weights in another precision are deleted. Raises ModelError or OSError.
    """
    # A folder that holds an input is refused as well: the export could replace the input in it.
    inputs = [path.resolve() for path in map(Path, (args.model, args.student)) if path.exists()]
    checkpoint.refuse_overwriting([args.output_dir], [*inputs, *chain(*(path.parents for path in inputs))])
    unet, vae, image_encoder = (load(args.model, variant=args.variant, revision=args.revision) for load in (
        model.load_unet, model.load_vae, model.load_image_encoder))
    if args.command == "unmerge":
        unet = merge_lora(load_lora(unet, args.student, whole=False), scale=-1)
    else:
        unet = load_student(args.student, unet, args.variant)
    checkpoint.check_fit(unet, vae, image_encoder)
    suffix = None if args.dtype == "fp32" else args.dtype
    for net, part in ((unet, "unet"), (vae, "vae"), (image_encoder, "image_encoder")):
        checkpoint.clear_parts(args.output_dir / part)
        save_network(net, args.output_dir / part, DTYPES[args.dtype], suffix)
        # Earlier weights, in shards or other precision, may be another student's. diffusers opens them.
        own = ".".join(filter(None, (net.file_stem, suffix, "safetensors")))
        for old in (args.output_dir / part).glob(f"{net.file_stem}[.-]*safetensors*"):
            if old.name != own:
                old.unlink()
    model.save_configs(args.output_dir)
    for licence in find_folder(args.model, "unet", args.variant, args.revision).parent.glob("LICENSE*"):
        shutil.copy(licence, args.output_dir)

    is_local = Path(args.model).exists()
    card = (ASSETS / "model_card.md").read_text(encoding="utf-8").format(
        name=args.push_to_hub or args.output_dir.resolve().name,
        base=SVD + "-xt" * (unet.config["num_frames"] > 14) if is_local else args.model,
        size="{}, {}".format(*model.default_size(unet)),
        options=f', variant="{suffix}", torch_dtype={DTYPES[args.dtype]}' if suffix else "")
    if is_local and vae.config["sample_size"] != 768:
        # The toy world's networks do not descend from SVD and do not carry its licence.
        card = re.sub(r"(?m)^(base_model|license).*\n", "", card)
    with replacing(args.output_dir / "README.md") as part:
        part.write_text(card, encoding="utf-8")


def main():
    parser = command_line("Export a student for diffusers.")
    flag = parser.add_argument
    flag("command", choices=("export", "merge", "unmerge"), help="merge is export; unmerge subtracts a LoRA")
    flag("--model", required=True, help="pipeline folder or hub id")
    flag("--student", required=True, help="UNet (folder, hub id, file) or LoRA (folder, file)")
    flag("--output_dir", type=Path, required=True, help="the folder to write")
    flag("--dtype", choices=DTYPES, default="fp32", help="precision of the weights; fp16: *.fp16.safetensors")
    flag("--variant", help="weights of --model to read, e.g. fp16")
    flag("--revision", help="branch, tag or commit of a hub id")
    flag("--push_to_hub", metavar="OWNER/NAME", help="then upload the folder to the hub under this name")
    args = parser.parse_args()
    export(args)
    print(f"wrote {args.output_dir}")
    if args.push_to_hub:                                    # only the exported files of the folder
        from huggingface_hub import create_repo, upload_folder
        exported = ["*.json", "*.safetensors", "README.md", "LICENSE*"]
        try:
            create_repo(args.push_to_hub, exist_ok=True)
            upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir, allow_patterns=exported)
        except Exception as error:                          # offline, not logged in, malformed name, quota
            raise ModelError(f"{args.push_to_hub}: not uploaded: {error!r}") from error


if __name__ == "__main__":
    main()
