"""A run in the region of SPHEREx's public bucket, on EC2 machines that end with the run.

    pip install 'spxdask[s3]' dask-cloudprovider[aws]
    python run.py

It needs AWS credentials that may start EC2 machines and write to the bucket of `output_dir`,
and an image built from deploy/container that the machines can pull. Within the region, only
requests to the archive's bucket cost money, and reading is about ten times as fast as from
elsewhere.
"""

from dask_cloudprovider.aws import EC2Cluster
from distributed import Client

from spxdask import BatchConfig, run_batch

IMAGE = "your-registry.example/spxdask:latest"
REGION = "us-east-1"

config = BatchConfig(
    catalog_path="s3://your-bucket/sources.csv",
    center_ra=270.0,
    center_dec=66.56,
    radius=1.0,
    output_dir="s3://your-bucket/ecliptic-pole",
    archive_url="s3://nasa-irsa-spherex",
    max_images=30_000,
    keep_images=False,
    max_download_workers=64,
    lightcurve_format="parquet",
)

if __name__ == "__main__":
    with (
        EC2Cluster(
            region=REGION,
            instance_type="m6i.xlarge",
            docker_image=IMAGE,
            n_workers=8,
            # One thread per core measures, and as many wait for downloads.
            worker_options={"nthreads": 8, "memory_limit": "14GB"},
            # A role that may write to the bucket of output_dir.
            iam_instance_profile={"Name": "spxdask-worker"},
            env_vars={"AWS_DEFAULT_REGION": REGION},
            use_private_ip=False,
        ) as cluster,
        Client(cluster) as client,
    ):
        print(run_batch(config, client=client).summary)
