#!/usr/bin/env bash
# Builds a stand-in for the public image python:3.12-slim-trixie, for machines that reach no image registry: Debian trixie from the
# Debian mirror this machine uses, and a CPython 3.12 of this machine under /usr/local, as the public image has it. Like that image
# it holds no compiler and no library that only some wheels need.
#   base.sh TAG      needs root, debootstrap, a running Docker Engine, a CPython 3.12 (SHELORA_PYTHON_312, pyenv's or uv's)
set -euo pipefail
tag=$1

fail() {
  printf 'base image: %s\n' "$@" >&2
  exit 1
}

find_python() {
  local candidate
  for candidate in "${SHELORA_PYTHON_312-}" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12 python3.12 \
    "$(uv python find --no-project --no-python-downloads 3.12 2>/dev/null || true)"; do
    [[ -n $candidate ]] && command -v "$candidate" >/dev/null || continue
    "$candidate" -I -c 'import sys; sys.version_info[:2] == (3, 12) or sys.exit(1); print(sys.base_prefix)' 2>/dev/null && return
  done
  return 1
}

[[ $(id -u) == 0 ]] || fail "needs root, for debootstrap"
command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"
prefix=$(find_python) || fail "found no CPython 3.12 on this machine: pyenv install 3.12, or name one in SHELORA_PYTHON_312"
mirror=$(apt-get indextargets --format '$(SITE)' 2>/dev/null | grep -v security | head -1)
[[ -n $mirror ]] || fail "apt names no Debian mirror on this machine"

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
libraries=libssl3t64,libsqlite3-0,libffi8,libbz2-1.0,liblzma5,libreadline8t64,libuuid1,libexpat1,zlib1g
debootstrap --variant=minbase --include="ca-certificates,netbase,tzdata,$libraries" trixie "$root" "$mirror" >"$root.log" 2>&1 ||
  { tail -5 "$root.log" >&2; fail "debootstrap failed"; }
rm -f "$root.log"

mkdir -p "$root/usr/local/bin" "$root/usr/local/lib"
cp "$prefix/bin/python3.12" "$root/usr/local/bin/"
[[ ! -e $prefix/lib/libpython3.12.so.1.0 ]] || cp "$prefix/lib/libpython3.12.so.1.0" "$root/usr/local/lib/"
tar -C "$prefix/lib" --exclude='__pycache__' --exclude='python3.12/site-packages/*' --exclude='python3.12/test' \
  --exclude='python3.12/config-3.12-*' -c python3.12 | tar -C "$root/usr/local/lib" -x
for name in python3 python; do
  ln -s python3.12 "$root/usr/local/bin/$name"
done
chroot "$root" ldconfig
chroot "$root" python -m ensurepip >/dev/null 2>&1
ln -s pip3.12 "$root/usr/local/bin/pip"
# Whatever certificate authorities this machine trusts for its package sources, its containers trust too.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*

authorities=/etc/ssl/certs/ca-certificates.crt
tar -C "$root" -c . | docker import --change "ENV PIP_CERT=$authorities SSL_CERT_FILE=$authorities" --change 'CMD ["python3"]' - "$tag" >/dev/null
docker run --rm "$tag" python -c 'import bz2, lzma, sqlite3, ssl, sys; print("base image:", "Python", sys.version.split()[0], ssl.OPENSSL_VERSION)'
