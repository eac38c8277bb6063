#!/usr/bin/env bash
# Downloads Code Llama weights with the signed URL from Meta's e-mail, using GNU wget or curl.
# Written for bash 3.2 too (the one of macOS): no associative arrays, no ${x,,}.
set -eu
set -f            # the URL holds a `*`: it must never be taken for a file name pattern
export LC_ALL=C   # weights are bytes, not text; and wget's log stays in English

ALL=7b,13b,34b,70b,7b-Python,13b-Python,34b-Python,70b-Python
ALL=$ALL,7b-Instruct,13b-Instruct,34b-Instruct,70b-Instruct
TRIES=5
ASK_ANEW="the URL has expired (they last 24 hours) or was pasted incompletely; ask for a new one"

say() { printf '%s\n' "$*"; }
die() { printf 'download.sh: %s\n' "$*" >&2; exit 1; }

HELP="Usage: download.sh [--url URL] [--models LIST] [--target DIR]
Downloads Code Llama weights, resuming what an earlier run left, and checks them. Asks for what is not given.
  --url URL      the URL from Meta's e-mail, with its '*'       (or the environment variable PRESIGNED_URL)
  --models LIST  for example 7b,13b-Python; 'all' for all       (or MODEL_SIZE)
  --target DIR   where the CodeLlama-... folders go, default .  (or TARGET_FOLDER)
Models: $ALL"

url=${PRESIGNED_URL:-} models=${MODEL_SIZE:-} target=${TARGET_FOLDER:-.} failed=''
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) say "$HELP"; exit 0 ;;
    --url) url=${2:-} ;; --models) models=${2:-} ;; --target) target=${2:-} ;;
    *) die "unknown option $1; see --help" ;;
  esac
  shift 2 || die "$1 needs a value; see --help"
done

# wget2 and busybox's wget log differently, which request and read_reply do not know: there curl is taken.
case $(wget --version 2>/dev/null || true) in
  "GNU Wget 1"*) tool=wget progress=--show-progress silent=--no-verbose ;;
  *) tool=curl progress=--progress-bar silent=--silent ;;
esac
command -v $tool >/dev/null || die "neither GNU wget nor curl is installed: install one of them"
[ -t 2 ] || progress=$silent
if command -v md5sum >/dev/null; then md5() { md5sum <"$1" | cut -d ' ' -f 1; }
elif command -v md5 >/dev/null; then md5() { command md5 -q "$1"; }
else die "neither md5sum nor md5 is installed: the files could not be verified"; fi

if [ -z "$url" ]; then
  printf 'Enter the URL from email: '
  read -r url || [ -n "$url" ] || die "no URL was given"
fi
url=$(printf '%s' "$url" | tr -d "[:space:]\"'\\\\")  # quotes, backslashes: pasted along, in no URL
case $url in http://*\** | https://*\**) ;;
  *) die "the URL must begin with https:// and contain a '*'; copy the link's whole text from the e-mail" ;;
esac
if [ -z "$models" ]; then
  printf '\nEnter the list of models to download without spaces (%s), or press Enter for all: ' "$ALL"
  # The end of the input is not an Enter: a script that forgot the models shall not fetch a terabyte.
  read -r models || [ -n "$models" ] || die "no models were given ('all' means all)"
  say
fi
case $models in '' | $'\r' | all) models=$ALL ;; esac
models=$(printf '%s' "$models" | tr ',\r' '  ') model=''
for model in $models; do
  case ",$ALL," in *",$model,"*) ;; *) die "unknown model '$model'; these are known: $ALL" ;; esac
done
[ -n "$model" ] || die "no models were given ('all' means all)"

mkdir -p "$target"
reply=$(mktemp "${TMPDIR:-/tmp}/download.XXXXXX")  # the headers of the server's latest reply
trap 'rm -f "$reply"' EXIT; trap 'exit 130' INT TERM

size() { if [ -f "$1" ]; then echo $(($(wc -c <"$1"))); else echo 0; fi; }  # wc pads with spaces on macOS
lists_sums() { grep -qE '^[0-9a-fA-F]{32} ' "$1" 2>/dev/null; }

# Is this a web page or an XML error in place of a file? (head, as it may be gigabytes of weights)
is_page() {
  [ -f "$1" ] && head -c 200 "$1" | tr -d '\000\357\273\277[:space:]' |
    grep -qiE '^<(!doctype|html|head|\?xml|error)'
}

# request URL FILE: one attempt, going on where FILE ends. The URL goes in by stdin, as the list of processes
# would show it with its signature.
request() {
  : >"$reply"
  if [ $tool = wget ]; then
    printf '%s\n' "$1" | wget --no-verbose $progress --server-response --output-file="$reply" \
      --tries=1 --timeout=60 --continue --output-document="$2" --input-file=-
  else
    printf 'url = "%s"\n' "$1" | curl --config - $progress --show-error --dump-header "$reply" --fail \
      --location --globoff --connect-timeout 60 --speed-limit 1 --speed-time 60 --continue-at - --output "$2"
  fi
}

# Sets status, type and total (the whole file's size, empty if not told) from the last reply's headers: those
# of redirects come before it.
read_reply() {
  IFS='|' read -r status total type <<<"$(awk '
    { gsub(/\r/, ""); name = tolower($1) }
    /^ *HTTP\// { status = $2; type = total = "" }
    name == "content-type:" { type = tolower($2) }
    name == "content-length:" && status == 200 { total = $2 }
    name == "content-range:" { total = $0; sub(/.*\//, "", total); if (total !~ /^[0-9]+$/) total = "" }
    END { print status "|" total "|" type }' "$reply")"
}

# fetch PATH PART: downloads into PART until it is whole; ends the script when the URL is no good.
fetch() {
  local try=0 before now rc
  if is_page "$2"; then rm -f "$2"; fi  # saved by another downloader
  while [ $try -lt $TRIES ]; do
    [ $try = 0 ] || sleep "${RETRY_WAIT:-5}"
    try=$((try + 1)) before=$(size "$2") rc=0
    request "${url%%\**}$1${url#*\*}" "$2" || rc=$?
    read_reply
    now=$(size "$2")
    [ "$now" != 0 ] || rm -f "$2"
    case $status in 401 | 403) die "HTTP $status for $1: $ASK_ANEW" ;; 2??) ;; *) type='' ;; esac
    if is_page "$2"; then type=text/html; fi
    case $type in text/html* | text/xml* | application/xml*)
      [ "$now" = "$before" ] || rm -f "$2"  # if unchanged, it is what an earlier run left, and good
      die "a web page or an error message came in place of $1: $ASK_ANEW" ;;
    esac
    # 416 without a size: nothing lies beyond what is here, so it is taken as whole; its checksum decides.
    if [ $rc = 0 ] || [ "$status" = 416 ]; then total=${total:-$now}; fi
    if [ "$now" != 0 ] && [ "$now" = "$total" ]; then return 0; fi
    say "  attempt $try of $TRIES failed: HTTP status ${status:-none}, $now of ${total:-unknown} bytes here"
    [ $tool = curl ] || sed -n 's/?[^ ]*//g; $p' "$reply"  # why, without the signature; curl told it itself
    case $status in 408 | 416 | 429) ;; 4??) return 1 ;; esac
    # From the start if it is too long, or if the server cannot resume (curl's 33).
    if [ $rc = 33 ] || [ "$now" -gt "${total:-$now}" ]; then rm -f "$2"; fi
  done
  return 1
}

fail() { say "FAILED $1: $2"; failed="$failed $1"; }

# obtain PATH [MD5]: the file under its own name only once it is whole and verified, PATH.part until then.
obtain() {
  local file="$target/$1" md5=${2:-}
  if [ -s "$file" ]; then
    if [ -z "$md5" ] || [ "$(md5 "$file")" = "$md5" ]; then say "Already here: $1"; return; fi
    mv -f "$file" "$file.part"  # likely left half done by another downloader: go on from there
  fi
  say "Downloading $1"
  if ! fetch "$1" "$file.part"; then
    fail "$1" "it could not be downloaded; run again to go on from there"
  elif [ -n "$md5" ] && [ "$(md5 "$file.part")" != "$md5" ]; then
    mv -f "$file.part" "$file.bad"
    fail "$1" "its checksum is wrong; it is now $file.bad: delete that, and run again to fetch it anew"
  else
    mv -f "$file.part" "$file"
  fi
}

for file in LICENSE USE_POLICY.md; do obtain $file; done
for model in $models; do
  folder=CodeLlama-$model list=$target/CodeLlama-$model/checklist.chk
  mkdir -p "$target/$folder"
  # The checklist comes first: it tells which of the other files are whole already.
  lists_sums "$list" || rm -f "$list" "$list.part"
  obtain "$folder/checklist.chk"
  [ -s "$list" ] || continue
  lists_sums "$list" || { fail "$folder/checklist.chk" "it lists no checksums"; continue; }
  case $model in 7b*) last=0 ;; 13b*) last=1 ;; 34b*) last=3 ;; *) last=7 ;; esac
  for file in params.json tokenizer.model $(seq -f 'consolidated.0%g.pth' 0 $last); do
    sum=$(awk -v f="$file" '{ gsub(/\r/, ""); sub(/^[*]/, "", $2) } $2 == f { print tolower($1) }' "$list")
    [ -n "$sum" ] || say "Note: $folder/checklist.chk does not list $file, so it is not verified"
    obtain "$folder/$file" "$sum"
  done
done
[ -z "$failed" ] || die "these files failed, run again with the same URL while it lasts:$failed"
say "All files are here and verified."
