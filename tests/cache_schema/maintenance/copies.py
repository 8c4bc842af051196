"""Helpers for tests of copies and merges: damaged sources, copied files, objects on S3."""

from pathlib import Path


def damage_file(file: Path, damage: str) -> None:
    """Delete or truncate a file; any other word flips a bit in its middle."""
    data = bytearray(file.read_bytes())
    if damage == "delete":
        file.unlink()
        return
    if damage == "truncate":
        del data[-1]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)


def travelling(files: dict[str, bytes]) -> dict[str, bytes]:
    """Without what stays at home."""
    return {p: data for p, data in files.items() if not p.startswith((".staging", "quarantine"))}


def objects_on_s3() -> dict[str, bytes]:
    """Every object of the bucket, as another client sees it."""
    import boto3

    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket="clips").get("Contents", [])
    paths = [entry["Key"] for entry in listed]
    return {path: client.get_object(Bucket="clips", Key=path)["Body"].read() for path in paths}


def store_on_s3(store: Path) -> dict[str, bytes]:
    prefix = f"cache/{store.name}/"
    return {path.removeprefix(prefix): data for path, data in objects_on_s3().items()}
