"""`python -m bayescal evaluate FILE`: recorded predictions of any framework to figures with intervals."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit status is 0 where everything was computed."""
    parser = argparse.ArgumentParser(prog="python -m bayescal", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("evaluate", help="metrics with intervals for predictions in a file")
    one.add_argument("file", help="npz, csv or parquet with logits or probs and labels, or mean, variance and targets")
    one.add_argument("--out", help="folder for metrics.json and report.html")
    one.add_argument(
        "--clip", type=float, help="smallest probability that the NLL counts with and calibrators see, such as 1e-12"
    )
    one.add_argument("--num-bins", type=int, default=15, help="bins of the calibration errors (default: 15)")
    one.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="replicates; 0 (default) = without resampling"
    )
    one.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    one.add_argument(
        "--calibrate",
        default="",
        metavar="NAMES",
        help="such as temperature,isotonic,temperature+isotonic: before and after",
    )
    one.add_argument(
        "--fit", help="rows to calibrate on: first-half (default), second-half, or a first share such as 0.2"
    )
    given = parser.parse_args(arguments)
    if given.fit and not given.calibrate:
        parser.error(
            "`--fit` says which rows `--calibrate` fits on, got no `--calibrate`. Add it, or leave `--fit` out."
        )
    from bayescal.programs import keep_programs  # after the arguments: jax takes a second to import
    from bayescal.recorded import evaluate_file
    from bayescal.recorded_page import print_table

    keep_programs()
    settings = {"num_bins": given.num_bins, "num_replicates": given.bootstrap, "seed": given.seed}
    if given.calibrate:
        settings |= {
            "calibrate": [name.strip() for name in given.calibrate.split(",")],
            "fit": given.fit or "first-half",
        }
    try:
        result = evaluate_file(given.file, out=given.out, clip=given.clip, **settings)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(result)
    if given.out:
        print(f"{given.out}/metrics.json {given.out}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
